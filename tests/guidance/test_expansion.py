"""Extending beams by their most probable tokens and by segments, against whole forward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.guidance import Segments
from iro_jax.models import prompt_keys
from iro_jax.search import AcceptFirst, per_parent, with_log_probs
from tests.guidance import cases

WEIGHTS = cases.weights(cases.POLICY, 0)


@functools.cache
def _forward():
    return jax.jit(
        lambda params, tokens, mask: cases.POLICY.forward(
            params, tokens, mask, want=("hidden", 1, 2, "logits")
        )
    )


def outputs(params, text):
    """Of a whole forward pass."""
    tokens = np.zeros((1, 48), np.int32)
    tokens[0, : len(text)] = text
    mask = np.arange(48)[None] < len(text)
    return _forward()(params, jnp.asarray(tokens), jnp.asarray(mask))


def states(params, text):
    """Hidden states of the last token, by depth."""
    found = outputs(params, text)
    return lambda depth: np.asarray(found.at(depth))[0, len(text) - 1]


def log_policy(text):
    logits = np.asarray(outputs(WEIGHTS, text).logits, np.float64)[0, len(text) - 1]
    return logits - np.logaddexp.reduce(logits)


def value_of(name, params):
    """V of a text under one of the cases' scorers."""
    scorer, of_scorer = cases.scored()[name]
    if name == "policy heads":

        def total(text):
            at = states(WEIGHTS, text)
            groups = zip(scorer.heads, scorer.layers, of_scorer.heads, strict=True)
            values = [np.asarray(head(p, jnp.asarray(at(layer)))) for head, layer, p in groups]
            return float(np.sum(np.concatenate(values) / np.asarray(of_scorer.betas)))

    elif name == "shared backbone":
        [network], [p] = scorer.networks, of_scorer.networks

        def total(text):
            at = states(p.backbone, text)(network.layer)
            values = np.asarray(network.head(p.head, jnp.asarray(at)))
            return float(np.sum(values / np.asarray(of_scorer.betas)))

    else:

        def total(text):
            return 0.0

    return scorer, of_scorer, total


@pytest.mark.parametrize("name", ["nothing", "policy heads", "shared backbone"])
def test_top_tokens_are_chosen_as_whole_prefixes_say(name):
    scorer, of_scorer, total = value_of(name, WEIGHTS)
    width = 5
    guided = cases.guided(
        scorer,
        beam_width=1,
        num_successors=width,
        chunk_length=1,
        capacity=6,
        successors="top_tokens",
        select_fn=with_log_probs(per_parent),
    )
    prompts = cases.prompts(3, seed=5, longest=12)
    tokens, mask = cases.batch(prompts)
    keys = prompt_keys(0, ["a", "b", "c"])
    output = jax.device_get(jax.jit(guided)(cases.guided_params(of_scorer), keys, tokens, mask))
    for row, prompt in enumerate(prompts):
        answer = []
        for step in range(6):
            log_probs = log_policy([*prompt, *answer])
            best = np.argsort(-log_probs, kind="stable")[:width]
            assert output.trace.tokens[step, row, 0, :, 0].tolist() == best.tolist()
            np.testing.assert_allclose(
                output.trace.token_log_probs[step, row, 0, :, 0], log_probs[best], atol=1e-4
            )
            scores = [total([*prompt, *answer, token]) for token in best]
            np.testing.assert_allclose(
                output.trace.scores.total[step, row, 0], scores, atol=1e-4, rtol=1e-4
            )
            answer.append(int(best[np.argmax(log_probs[best] + scores)]))
            if answer[-1] in cases.EOS:
                break
        assert output.beams.tokens[row, 0, : output.beams.lengths[row, 0]].tolist() == answer


@pytest.mark.parametrize(
    ("name", "changes", "slots"),
    [
        ("two networks", {}, 3),
        ("two networks", {"chunk_length": 1}, 1),
        ("two networks", {"segments": Segments()}, 4),
        ("policy heads", {}, 4),
    ],
)
def test_last_tokens_wait_where_nobody_looks_at_candidates(name, changes, slots):
    """They are read with the beams that are kept; `TestWatching` compares the answers."""
    scorer, of_scorer = cases.scored()[name]
    guided = cases.guided(scorer, **changes)
    params = cases.guided_params(of_scorer)
    root = jax.eval_shape(guided.root, params, *cases.batch(cases.prompts(1)))
    assert root.expand_memory.cache.chunk.slots == slots


def test_segments_end_where_the_policy_is_in_doubt():
    # The median entropy of this policy, so that some chunks end early and others do not.
    some = cases.prompts(12, seed=8, longest=12)
    entropies = [-np.sum(np.exp(p) * p) for p in (log_policy(prompt) for prompt in some)]
    segments = Segments(entropy=float(np.median(entropies)), min_tokens=2)
    scorer, of_scorer, _ = value_of("policy heads", WEIGHTS)
    guided = cases.guided(
        scorer,
        beam_width=1,
        num_successors=4,
        chunk_length=5,
        capacity=12,
        segments=segments,
        select_fn=AcceptFirst(goal=1.0, horizon=12),
    )
    prompts = some[:4]
    tokens, mask = cases.batch(prompts)
    keys = prompt_keys(0, list("abcd"))
    output = jax.device_get(jax.jit(guided)(cases.guided_params(of_scorer), keys, tokens, mask))
    seen = set()
    for row, prompt in enumerate(prompts):
        answer = []
        for step in range(int(output.num_steps[row])):
            for slot in range(4):
                length = int(output.trace.chunk_lengths[step, row, 0, slot])
                chunk = output.trace.tokens[step, row, 0, slot, :length].tolist()
                expected = 0
                for i in range(min(5, 12 - len(answer))):
                    log_probs = log_policy([*prompt, *answer, *chunk[:i]])
                    entropy = -np.sum(np.exp(log_probs) * log_probs)
                    if i >= 2 and entropy >= segments.entropy:
                        break
                    expected += 1
                    if chunk[i] in cases.EOS:
                        break
                assert length == expected
                seen.add(length)
            slot = int(output.trace.selected[step, row, 0])
            length = int(output.trace.chunk_lengths[step, row, 0, slot])
            answer += output.trace.tokens[step, row, 0, slot, :length].tolist()
        assert output.beams.tokens[row, 0, : output.beams.lengths[row, 0]].tolist() == answer
    assert len(seen) > 2, "all segments of one or two lengths would test little"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"successors": "all"}, "'sampled' or 'top_tokens'"),
        ({"successors": "top_tokens"}, "chunk_length=4"),
        ({"successors": "top_tokens", "chunk_length": 1, "num_successors": 65}, "at most 64"),
    ],
)
def test_sizes_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        cases.guided(cases.NoScore(), **changes)
