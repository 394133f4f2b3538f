"""The floor of decoding: the products of activations with every weight matrix, nothing else.

No norms, no attention, no caches, no draws: what is left is reading the weights. The programs
here compute products of the shapes that a network's own have, with its own weights and by the
same kernels, as often as a step or a search does. What they compute means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iro_jax.models import Params
from kernels import Coded, matmul, matmul_coded, matmul_transposed

Product: TypeAlias = Callable[[Array, Array], Array]


def layer_matmuls(
    params: Params, x: Float[Array, "rows D"], product: Product = matmul
) -> Float[Array, "rows D"]:
    """The products of all layers, for every row; `product` computes those of weights in f32.

    Returns:
      `x`, but for its first number.
    """
    width = x.shape[-1]
    for index in params["layers"]:
        layer = params["layers"][index]
        for room, first, second in (("attention", "qkv", "output"), ("mlp", "up", "down")):
            kernel = layer[room][second]["kernel"].get_value()
            inner = kernel.num_inputs if isinstance(kernel, Coded) else kernel.size // width
            # Without norms between them, products of products would soon be infinite.
            hidden = _multiply(x, layer[room][first]["kernel"].get_value(), product)
            # All of it is computed, XLA would leave out what nobody reads; and before the next.
            found = lax.optimization_barrier(_multiply(hidden[:, :inner], kernel, product))
            x = x.at[0, 0].add(1e-6 * found[0, 0])
    return x


def _multiply(x: Array, kernel: Array | Coded, product: Product) -> Array:
    if isinstance(kernel, Coded):
        return matmul_coded(x, kernel)
    return product(x, kernel.reshape(x.shape[-1], -1))


def decode_matmuls(
    params: Params, x: Float[Array, "rows D"], num_steps: int
) -> Float[Array, "rows D"]:
    """The products of so many decode steps, the unembedding included."""
    table = params["unembedding" if "unembedding" in params else "embedding"].get_value()

    def step(_, x):
        x = layer_matmuls(params, x)
        # All logits are computed, and by a product of its own: XLA on CPU would compute it three
        # times slower in one loop with whatever reads them.
        product = matmul_coded if isinstance(table, Coded) else matmul_transposed
        logits = lax.optimization_barrier(product(x, table))
        return x + 1e-6 * logits[0, 0]

    return lax.fori_loop(0, num_steps, step, x)


def search_matmuls(
    policy: Params,
    values: tuple[Params, ...],
    x: Float[Array, "prompt_slots D"],
    *,
    candidates: int,
    chunk_length: int,
    num_chunks: int,
) -> tuple[Array, tuple[Array, ...]]:
    """The products of a whole search.

    Args:
      policy: its weights.
      values: those of every value network that is read. Each is an argument of the program,
        even where two are the same arrays: their equal products would be computed once.
      x: a row for each slot of the prompts, which all networks read.
      candidates: of all prompts together; a decode step's rows.
      chunk_length: decode steps between two readings of the value networks, each of which has a
        row for every token of every candidate's chunk.
      num_chunks: of an answer.
    """

    def read_prompts(params: Params, rows: int) -> Array:
        read = jnp.resize(layer_matmuls(params, x), (rows, x.shape[-1]))
        # Kernels multiply equal rows once: all must differ.
        return read * (1 + jnp.arange(rows)[:, None] / rows)

    def chunk(_, state):
        tokens, chunks = state
        tokens = decode_matmuls(policy, tokens, chunk_length)
        return tokens, tuple(map(layer_matmuls, values, chunks))

    chunks = tuple(read_prompts(params, candidates * chunk_length) for params in values)
    return lax.fori_loop(0, num_chunks, chunk, (read_prompts(policy, candidates), chunks))
