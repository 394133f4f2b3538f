"""Each family computes what `transformers` computes, through every kind of cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.models import Network, from_pretrained
from tests.models.references import VOCABULARY, all_variants, reference_logits

pytestmark = pytest.mark.slow

PROMPT_LENGTHS = (5, 19, 11)
PROMPT_SLOTS = 24
BEAMS, SUCCESSORS, CHUNK, CHUNKS = 2, 2, 8, 8
TOLERANCE = 1e-4


def ragged_prompts(rng, side):
    """Prompts padded on one side, with rubbish where there is padding."""
    tokens = rng.integers(0, VOCABULARY, (len(PROMPT_LENGTHS), PROMPT_SLOTS))
    mask = np.zeros(tokens.shape, bool)
    for row, length in enumerate(PROMPT_LENGTHS):
        span = slice(0, length) if side == "right" else slice(PROMPT_SLOTS - length, None)
        mask[row, span] = True
    return tokens.astype(np.int32), mask


@all_variants
def test_prefill_and_decode_through_the_three_part_cache(variant, tmp_path):
    """64 tokens deep, beams reordered after each chunk, all logits against the reference."""
    reference = variant.causal()
    reference.save_pretrained(tmp_path / "model")
    model = from_pretrained(tmp_path / "model")
    network: Network = model.network
    rng = np.random.default_rng(0)
    tokens, mask = ragged_prompts(rng, "left" if len(variant.name) % 2 else "right")

    cache = network.empty_cache(
        num_prompts=len(tokens),
        prompt_slots=PROMPT_SLOTS,
        beam_width=BEAMS,
        beam_slots=CHUNK * CHUNKS,
        num_successors=SUCCESSORS,
        chunk_length=CHUNK,
    )
    outputs, cache = jax.jit(network.prefill, static_argnames="every_position")(
        model.params, cache, tokens, mask, every_position=True
    )
    prompts = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    expected = reference_logits(reference, prompts)
    assert max(np.std(logits) for logits in expected) > 0.5, "a comparison of near-zeros"
    for got, keep, want in zip(np.asarray(outputs.logits), mask, expected, strict=True):
        np.testing.assert_allclose(got[keep], want, atol=TOLERANCE, rtol=0)

    decode = jax.jit(network.decode)
    commit = jax.jit(type(cache).commit)
    histories = [[list(prompt) for _ in range(BEAMS)] for prompt in prompts]
    for _ in range(CHUNKS):
        new = rng.integers(0, VOCABULARY, (len(prompts), BEAMS, SUCCESSORS, CHUNK), np.int32)
        steps = []
        for step in range(CHUNK):
            outputs, cache = decode(model.params, cache, new[..., step : step + 1])
            steps.append(np.asarray(outputs.logits)[..., 0, :])
        got = np.stack(steps, axis=3)

        candidates = [
            [
                histories[p][u // SUCCESSORS] + new[p].reshape(-1, CHUNK)[u].tolist()
                for u in range(4)
            ]
            for p in range(len(prompts))
        ]
        for p, of_prompt in enumerate(candidates):
            expected = reference_logits(reference, of_prompt)
            want = np.stack([logits[-CHUNK:] for logits in expected])
            np.testing.assert_allclose(got[p].reshape(want.shape), want, atol=TOLERANCE, rtol=0)
        parents = rng.integers(0, BEAMS * SUCCESSORS, (len(prompts), BEAMS))
        cache = commit(cache, parents)
        histories = [[candidates[p][u] for u in row] for p, row in enumerate(parents)]
    np.testing.assert_array_equal(cache.beams.cursor, CHUNK * CHUNKS)


@all_variants
def test_reading_a_chunk_at_once_equals_reading_it_token_by_token(variant, tmp_path):
    """How value networks score a chunk, with candidates that ended early."""
    variant.causal().save_pretrained(tmp_path / "model")
    model = from_pretrained(tmp_path / "model")
    network, params = model.network, model.params
    rng = np.random.default_rng(1)
    tokens, mask = ragged_prompts(rng, "right")
    sizes = {"num_prompts": 3, "prompt_slots": PROMPT_SLOTS, "num_successors": 2}
    cache = network.empty_cache(**sizes, beam_slots=4, chunk_length=4)
    _, cache = jax.jit(network.prefill)(params, cache, tokens, mask)
    new = rng.integers(0, VOCABULARY, (3, 1, 2, 4), np.int32)
    alive = np.arange(4) < np.array([[[4, 2]], [[1, 3]], [[4, 4]]])[..., None]

    decode = jax.jit(network.decode)
    at_once, whole = decode(params, cache, new, alive)
    for step in range(4):
        window = slice(step, step + 1)
        outputs, cache = decode(params, cache, new[..., window], alive[..., window])
        got = np.asarray(outputs.logits)[..., 0, :][alive[..., step]]
        want = np.asarray(at_once.logits)[..., step, :][alive[..., step]]
        np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(whole.chunk.lengths, alive.sum(-1))
    np.testing.assert_array_equal(whole.chunk.positions, cache.chunk.positions)


def test_bfloat16_computes_near_float32(tmp_path):
    from tests.models.references import VARIANTS

    VARIANTS[0].causal(initializer_range=0.1).save_pretrained(tmp_path / "model")
    tokens, mask = ragged_prompts(np.random.default_rng(0), "right")
    logits = {}
    for dtype in ("float32", "bfloat16"):
        model = from_pretrained(tmp_path / "model", dtype=dtype)
        outputs = model.network.forward(model.params, tokens, mask, want=("logits", "hidden"))
        assert outputs.hidden.dtype == dtype
        assert outputs.logits.dtype == jnp.float32
        logits[dtype] = np.asarray(outputs.logits)[mask]
    error = np.abs(logits["bfloat16"] - logits["float32"]).max()
    assert 0 < error < 0.1 * np.abs(logits["float32"]).max()
