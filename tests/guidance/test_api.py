"""The search through an API: the oracle's answers, and what it refuses."""

import collections
import dataclasses
import functools
import time
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from iro_jax import search as s
from iro_jax.guidance import Bridge, BridgedValues, NoScore, ValueSum
from iro_jax.guidance.api import ApiGuide, api_value_scorer, chat_text
from iro_jax.guidance.api_sampler import BYTE_TOKENS
from iro_jax.guidance.endpoint import END
from iro_jax.models import Pretrained, Sampling, TextFormat, pad_prompts, render
from iro_jax.testing import tiny_network, word_tokenizer
from iro_jax.values import ValueNetwork
from tests.guidance.completions_server import (
    CompletionsServer,
    TextModel,
    bytes_text,
    choice,
    completion,
    endpoint,
    ids_of,
    serve,
    text_choice,
)
from tests.search.oracle import distinct_first, oracle_search

pytestmark = pytest.mark.needs("openai")

PROMPTS = ["The film was", "naïve 😀 ", "x\n", "你好", "a b"]
SMALL = {"beam_width": 3, "num_successors": 2, "chunk_length": 3, "max_new_tokens": 8}


def guide_of(server, **settings):
    return ApiGuide(endpoint(server), **(SHARED | settings))


@dataclasses.dataclass(frozen=True)
class ByteScore:
    """A number for every text: a sum over bytes and places, as its remainder by 101."""

    features: ClassVar[tuple] = ()

    def check(self, policy):
        pass

    def root(self, params, tokens, mask, features, sizes):
        return s.Scores(jnp.zeros(len(tokens)), jnp.zeros((len(tokens), 1))), None

    def __call__(self, params, candidates, memory):
        ids = s.sequences(candidates).reshape(*candidates.new.shape, -1)
        place = jnp.arange(ids.shape[-1])
        inside = place < candidates.lengths[..., None]
        total = (jnp.where(inside, ids * (7 * place + 3), 0).sum(-1) % 101).astype(jnp.float32)
        return s.Scores(total, total[..., None]), memory

    @staticmethod
    def of(ids):
        return float(sum(i * (7 * place + 3) for place, i in enumerate(ids)) % 101)


SHARED = SMALL | {"scorer": ByteScore(), "batch_size": 3}
"""Of nearly all guides here, so that they share what is compiled."""


def oracle(model, requests, prompt, *, stops=(), **sizes):
    """The search of one prompt in plain Python, with the seeds that the server was given."""
    seeds = {body["prompt"]: body["seed"] for body in requests}
    turns = collections.Counter()
    chunks = {}

    def text_of(tokens):
        return "".join(token or "" for token in tokens)

    def draw(step, row, slot, prefix, i):
        if i == 0:
            text = prompt + text_of(prefix)
            index = turns[step, text]
            turns[step, text] += 1
            limit = min(sizes["chunk_length"], sizes["max_new_tokens"] - len(prefix))
            chunks[step, row, slot] = model.sample(text, limit, seeds[text], index)
        token, probability = chunks[step, row, slot][i]
        stopped = any(stop in text_of((*prefix, token)) for stop in stops)
        return token, np.log(probability), token is None or stopped

    result = oracle_search(
        draw=draw,
        score=lambda tokens: ByteScore.of(ids_of(tokens)),
        width=sizes["beam_width"],
        successors=sizes["num_successors"],
        chunk_length=sizes["chunk_length"],
        limit=sizes["max_new_tokens"],
        select=distinct_first,
    )
    asked = sum(turns.values())
    return result, asked


@pytest.mark.parametrize("stops", [(), ("b", "é.", " the film")])
def test_the_search_is_the_oracles(server, stops):
    """Finalists, scores, log-probabilities and counts; stop strings may span chunks."""
    model = TextModel()
    guide = guide_of(server, stop_strings=stops)
    for prompt, found in zip(PROMPTS, guide(PROMPTS), strict=True):
        own = [body for body in server.requests if body["prompt"].startswith(prompt)]
        expected, asked = oracle(model, own, prompt, stops=stops, **SMALL)
        assert found.answers[0].tokens == tuple(ids_of(expected.best.tokens))
        for answer, ranked in zip(found.answers, expected.ranked, strict=True):
            assert answer.score == ranked.score == answer.values[0] == ByteScore.of(answer.tokens)
            assert answer.finished == ranked.ended
        assert sorted(a.tokens for a in found.answers) == sorted(
            tuple(ids_of(r.tokens)) for r in expected.ranked
        )
        np.testing.assert_allclose(
            sorted(a.log_prob for a in found.answers),
            sorted(r.log_prob for r in expected.ranked),
            rtol=1e-5,
        )
        assert found.num_queries == expected.num_queries == asked
        assert sum(body["n"] for body in own) == asked
        if not stops:
            assert found.num_tokens == expected.num_tokens
    for found in guide(PROMPTS):
        for answer in found.answers:
            assert not any(stop in answer.text for stop in stops)


def test_the_server_sees_the_prompt_and_the_answer_so_far():
    """And nothing else: every request of a later step continues a reply of the step before."""
    model = TextModel(end_weight=0.1)
    known, limits = {"né ": 0}, [3, 3, 2]
    with CompletionsServer(serve(model)) as server:
        [found] = guide_of(server)(["né "])
    for body in server.requests:
        text, step = body["prompt"], known[body["prompt"]]
        assert body["max_tokens"] == limits[step]
        for index in range(body["n"]):
            sampled = model.sample(text, limits[step], body["seed"], index)
            known[text + "".join(token or "" for token, _ in sampled)] = step + 1
    assert [body["n"] for body in server.requests] == [6, 2, 2, 2, 2, 2, 2]
    assert len({body["seed"] for body in server.requests}) == 7
    assert {"né " + answer.text for answer in found.answers} <= known.keys()
    assert all(answer.text == bytes_text(answer.tokens) for answer in found.answers)
    assert any(not answer.text.isascii() for answer in found.answers)


def test_a_request_carries_the_sampling(server):
    sampling = Sampling(0.6, top_k=50, top_p=0.9)
    through = endpoint(server, extra_body={"min_p": 0.1})
    ApiGuide(through, sampling=sampling, **SHARED)(["x"])
    for body in server.requests:
        assert (body["temperature"], body["top_p"], body["top_k"]) == (0.6, 0.9, 50)
        assert (body["min_p"], body["logprobs"], body["model"]) == (0.1, 1, "tiny")
    server.requests.clear()
    ApiGuide(endpoint(server, log_probs=False), **SHARED)(["x"])
    for body in server.requests:
        assert not {"top_k", "logprobs", "stop"} & body.keys()
        assert body["top_p"] == 1


def test_answers_depend_on_the_seed_and_the_prompts_name_alone(server):
    guide = guide_of(server)
    together = guide(PROMPTS, seed=1)
    assert guide(PROMPTS, seed=1) == together
    assert guide(PROMPTS, seed=2) != together
    assert guide(PROMPTS[3:4], seed=1, prompt_ids=["3"]) == together[3:4]
    one_by_one = ApiGuide(endpoint(server, max_connections=1), **SHARED)
    assert one_by_one(PROMPTS[::-1], seed=1, prompt_ids=list("43210")) == together[::-1]


@pytest.mark.parametrize("log_probs", [True, False])
def test_tokens_and_requests_are_counted(server, log_probs):
    through = endpoint(server, log_probs=log_probs)
    found = ApiGuide(through, **SHARED)(PROMPTS[:2])
    assert through.num_requests == len(server.requests) == through.prompt_tokens
    assert through.num_tokens == sum(one.num_tokens for one in found)
    sampled = [
        TextModel().sample(body["prompt"], body["max_tokens"], body["seed"], index)
        for body in server.requests
        for index in range(body["n"])
    ]
    assert through.num_tokens == sum(map(len, sampled))


def test_best_of_n_needs_one_request(server):
    def reward(prompts, answers):
        return [answer.count("a") for answer in answers]

    guide = ApiGuide(
        endpoint(server),
        beam_width=1,
        num_successors=12,
        chunk_length=9,
        max_new_tokens=9,
        final_selection="reward",
        reward=reward,
    )
    [found] = guide(["x"])
    [body] = server.requests
    sampled = [TextModel().sample("x", 9, body["seed"], index) for index in range(12)]
    texts = ["".join(token or "" for token, _ in one) for one in sampled]
    assert (body["n"], body["max_tokens"]) == (12, 9)
    assert sorted(answer.text for answer in found.answers) == sorted(texts)
    assert found.answers[0].reward == max(text.count("a") for text in texts)


def test_requests_of_a_step_are_sent_together():
    model = serve(TextModel())

    def slow(body):
        time.sleep(0.03)
        return model(body)

    with CompletionsServer(slow) as server:
        ApiGuide(endpoint(server, max_connections=2), **SHARED)(PROMPTS)
        assert server.most_at_once == 2


# Values.


def written_tokenizer():
    """Bytes and a few merges of them: training one could break ties in another way each time."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "b"), ("a", "a"), ("i", "l")]
    merges += [("Ġ", "f"), ("Ġf", "il"), (".", "."), ("Ã", "©")]
    tokens = ["<unk>", "<s>", "</s>", *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def valued(tmp_path_factory):
    """A value network with its tokenizer."""
    tokenizer = written_tokenizer()
    network = tiny_network(vocab_size=len(tokenizer), head="score", context_length=4096)
    params = jax.tree.map(lambda x: 6 * x, network.init(jax.random.key(1)))
    path = tmp_path_factory.getbasetemp()
    return Pretrained(network, params, tokenizer, (), {}, path)


def byte_scorer(valued):
    """With room for twice twelve tokens, as many as the answers here need."""
    return api_value_scorer([valued], [0.5], chunk_length=12)


@functools.cache
def forward(network):
    return jax.jit(network.forward)


def forward_values(valued, scorer, prompt, answers):
    """The values of whole answers, each re-tokenised and read behind the prompt."""
    base = render(valued.tokenizer, prompt).tolist()
    rows = [base + scorer.bridge.foreign_tokens(a.tokens, complete=True) for a in answers]
    batch = pad_prompts([np.array(row) for row in rows], length=128, rows=16)
    [network], [params] = scorer.values.networks, byte_scorer(valued)[1].networks
    values = np.asarray(forward(network)(params, batch.tokens, batch.mask))
    return [float(values[i, len(row) - 1, 0]) for i, row in enumerate(rows)]


def test_values_guide_and_the_best_answer_is_the_best_by_value(server, valued):
    scorer, params, tokenizer = byte_scorer(valued)
    guide = guide_of(server, scorer=scorer, scorer_params=params, scorer_tokenizer=tokenizer)
    guided, free = guide(PROMPTS), guide_of(server)(PROMPTS)
    for prompt, found in zip(PROMPTS, guided, strict=True):
        values = forward_values(valued, scorer, prompt, found.answers)
        for answer, value in zip(found.answers, values, strict=True):
            assert answer.values[0] == pytest.approx(value, abs=1e-4)
            assert answer.score == pytest.approx(value / 0.5, abs=2e-4)
        assert values[0] >= max(values) - 1e-4
    assert max(found.num_queries for found in guided) == 18
    gain = [found.answers[0].values[0] for found in guided]
    plain = [
        np.mean(forward_values(valued, scorer, prompt, found.answers))
        for prompt, found in zip(PROMPTS, free, strict=True)
    ]
    assert np.mean(gain) > np.mean(plain)


def test_a_wider_bridge_costs_no_requests(server, valued):
    scorer, params, tokenizer = byte_scorer(valued)
    bind = functools.partial(guide_of, server, scorer_params=params, scorer_tokenizer=tokenizer)
    wide = bind(scorer=scorer)(PROMPTS)
    asked = sorted(map(repr, server.requests))
    server.requests.clear()
    narrow = api_value_scorer([valued], [0.5], chunk_length=6)[0]
    guide = bind(scorer=narrow)
    assert [[a.tokens for a in one.answers] for one in guide(PROMPTS)] == [
        [a.tokens for a in one.answers] for one in wide
    ]
    assert guide.scorer.bridge.slots == scorer.bridge.slots == 2 * narrow.bridge.slots
    assert sorted(map(repr, server.requests)) == asked


def test_a_server_without_log_probs_is_warned_of_once():
    body = completion([text_choice("ab", "stop")] * 6)
    with CompletionsServer(lambda _: body) as server:
        guide = guide_of(server)
        with pytest.warns(UserWarning, match="gives no log-probabilities") as warned:
            found = guide(["x", "y"])
        assert len([w for w in warned if "log-prob" in str(w.message)]) == 1
        assert [one.answers[0].log_prob for one in found] == [0.0, 0.0]
        # It does not say how many tokens it sampled either: as many as it was allowed.
        assert [one.num_tokens for one in found] == [18, 18]


def test_an_empty_completion_ends_the_answer():
    body = completion([text_choice("", "stop")] * 6)
    with CompletionsServer(lambda _: body) as server:
        [found] = ApiGuide(endpoint(server, log_probs=False), **SHARED)(["x"])
        assert len(server.requests) == 1
    assert (found.text, found.answers[0].tokens, found.answers[0].finished) == ("", (END,), True)


def test_answers_are_whole_where_chunks_have_too_little_room():
    """Every chunk goes on where the one before was cut."""
    model = TextModel(end_weight=0.2)
    told = {}

    def long_words(body):
        """Each token nine times: up to 189 bytes where a chunk has room for 49."""
        found = []
        for index in range(body["n"]):
            sampled = model.sample(body["prompt"], body["max_tokens"], body["seed"], index)
            text = "".join((token or "") * 9 for token, _ in sampled)
            told.setdefault(body["prompt"], []).append(text)
            found.append(text_choice(text, choice(sampled)["finish_reason"]))
        return completion(found)

    with CompletionsServer(long_words) as server:
        found = ApiGuide(endpoint(server, log_probs=False), **SHARED)(PROMPTS)

    def chunks_of(text, whole):
        """The chunks that lead from one text to the other."""
        if text == whole:
            return []
        for chunk in told.get(text, ()):
            if chunk and whole.startswith(text + fit(chunk)):
                rest = chunks_of(text + fit(chunk), whole)
                if rest is not None:
                    return [chunk, *rest]
        return None

    paths = [
        chunks_of(prompt, prompt + answer.text)
        for prompt, one in zip(PROMPTS, found, strict=True)
        for answer in one.answers
    ]
    assert None not in paths
    assert sum(fit(chunk) != chunk for path in paths for chunk in path) > 3
    assert max(map(len, paths)) == 3


def fit(text, room=49):
    return text.encode()[:room].decode(errors="ignore")


def test_conversations_are_rendered_with_the_chat_template(server):
    tokenizer = word_tokenizer(["hello"], bos=True)
    conversation = [{"role": "user", "content": "hello"}]
    text = "<turn> user hello </turn> <turn> assistant "
    assert chat_text(tokenizer, conversation) == text
    guide = guide_of(server, chat_tokenizer=tokenizer)
    guide([conversation, "hello"])
    assert {body["prompt"] for body in server.requests} >= {text, "hello"}
    answered = [*conversation, {"role": "assistant", "content": "hello"}]
    with pytest.raises(ValueError, match="Prompt 1: The conversation has an answer already"):
        guide(["x", answered])
    with pytest.raises(ValueError, match="Prompt 0: Message 0 must have a role"):
        guide([[{"content": "hello"}]])


def test_a_bos_that_the_server_adds_is_left_out():
    twice, once = word_tokenizer(["hello"], bos=True), word_tokenizer(["hello"])
    for tokenizer in (twice, once):
        tokenizer.chat_template = "<bos>" + tokenizer.chat_template
    conversation = [{"role": "user", "content": "hello"}]
    assert chat_text(twice, conversation).startswith("<turn> user")
    assert chat_text(once, conversation).startswith("<bos><turn> user")


def test_prompts_that_cannot_be_sent_are_refused_before_anything_is(server, valued):
    scorer, params, tokenizer = api_value_scorer([valued], [1.0], chunk_length=3)
    guide = ApiGuide(
        endpoint(server),
        scorer,
        params,
        scorer_tokenizer=tokenizer,
        text_format=TextFormat(max_length=6),
        **SMALL,
    )
    with pytest.raises(ValueError, match="Prompt 1: The prompt is empty"):
        guide(["x", ""])
    with pytest.raises(ValueError, match=r"Prompt 0: .*longer than the 6 tokens"):
        guide(["word " * 50])
    with pytest.raises(ValueError, match="Prompt 0: A completions endpoint takes text"):
        guide([[{"role": "user", "content": "hello"}]])
    with pytest.raises(ValueError, match="Expected a list of prompts"):
        guide("x")
    assert server.requests == []


def test_settings_that_cannot_work_are_refused(server, valued):
    through = endpoint(server)
    scorer, params, tokenizer = api_value_scorer([valued], [1.0])
    for name in ("beam_width", "num_successors", "chunk_length", "max_new_tokens", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1. Got: 0"):
            ApiGuide(through, **(SMALL | {name: 0}))
    with pytest.raises(ValueError, match=r"bytes_per_token must be at least 4. Got: 3"):
        ApiGuide(through, bytes_per_token=3)
    for stops in ("stop", [""]):
        with pytest.raises(ValueError, match="list of non-empty texts"):
            ApiGuide(through, stop_strings=stops)
    with pytest.raises(ValueError, match="belong together"):
        ApiGuide(through, scorer, params)
    with pytest.raises(ValueError, match="belong together"):
        ApiGuide(through, final_selection="reward")
    with pytest.raises(ValueError, match=r"reads text.*Got: ValueSum"):
        ApiGuide(through, scorer.values, params)
    other = Bridge(BYTE_TOKENS[:-1], [255], tokenizer, 2, vocab_size=len(tokenizer), slots=8)
    with pytest.raises(ValueError, match=r"leads from bytes.*Got: one from 256 tokens"):
        ApiGuide(through, BridgedValues(scorer.values, other), params, scorer_tokenizer=tokenizer)
    small = ValueSum((ValueNetwork(tiny_network(vocab_size=10, head="score")),))
    with pytest.raises(ValueError, match=r"more than a value network knows. Got: vocab_size=10"):
        ApiGuide(
            through, dataclasses.replace(scorer, values=small), params, scorer_tokenizer=tokenizer
        )
    with pytest.raises(ValueError, match="leave room for a prompt"):
        ApiGuide(through, scorer, params, scorer_tokenizer=tokenizer, max_new_tokens=4096)
    with pytest.raises(ValueError, match="max_connections and max_choices must be at least 1"):
        endpoint(server, max_connections=0)
    with pytest.raises(ValueError, match="betas must be 1 positive"):
        api_value_scorer([valued], [1.0, 2.0])
    assert isinstance(ApiGuide(through).scorer, NoScore)
