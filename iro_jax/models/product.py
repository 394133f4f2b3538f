"""The product of activations with a matrix of weights, for as many rows as there are."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Measured on two cores, all layers of a network of 135M parameters: with the weights as the left
# factor, products of 16, 64, 128 and 256 rows take 15, 14, 10 and 5% less time, of 512 no less.
_FEW_ROWS = 256
# The result is transposed afterwards, which costs more than it saves when it leaves the cache.
_SMALL_RESULT = 2**22


def product(
    rows: Float[Array, "rows inputs"],
    weights: Float[Array, "outputs inputs"],
    dtype: jnp.dtype | None = None,
) -> Float[Array, "rows outputs"]:
    """`rows @ weights.T`, computed in the order of factors that is faster.

    Args:
      dtype: of the result and of the sums; by default that of the factors.
    """

    def plain(rows: Array, weights: Array) -> Array:
        return lax.dot_general(
            rows, weights, (((1,), (1,)), ((), ())), preferred_element_type=dtype
        )

    def weights_first(rows: Array, weights: Array) -> Array:
        # The barriers keep XLA from turning the product around again.
        columns = lax.optimization_barrier(rows.T)
        return lax.optimization_barrier(weights @ columns).T

    few = len(rows) <= _FEW_ROWS and len(rows) * len(weights) <= _SMALL_RESULT
    if not few or {rows.dtype, weights.dtype} != {jnp.dtype(jnp.float32)}:
        return plain(rows, weights)
    return lax.platform_dependent(rows, weights, cpu=weights_first, default=plain)
