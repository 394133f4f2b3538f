"""Small networks from a hidden state to a value, T of them at once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

HeadParams: TypeAlias = tuple[dict[str, Array], ...]
"""One dictionary a layer: `kernel` `[T, inputs, outputs]`, and `bias` `[T, outputs]` or none."""


@dataclasses.dataclass(frozen=True)
class Head:
    """T heads of one shape. Letters: T heads, D width of the features. All in f32.

    Attributes:
      hidden: widths of the hidden layers (SiLU); none makes the heads linear.
      bias: whether layers have biases; linear heads without one open in `transformers`.
      output: `sigmoid` for verifiable rewards (equation 49), where the last layer gives a
        logit.
    """

    hidden: tuple[int, ...] = ()
    bias: bool = True
    output: Literal["identity", "sigmoid"] = "identity"

    def __post_init__(self):
        if self.output not in ("identity", "sigmoid"):
            raise ValueError(f"output must be 'identity' or 'sigmoid'. Got: {self.output!r}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"Hidden layers need a width of at least 1. Got: {self.hidden}")

    def init(self, key: Key[Array, ""], width: int, copies: int = 1) -> HeadParams:
        """Random hidden layers and a last layer of deviation 0.02, for T = `copies` heads."""
        sizes = (width, *self.hidden, 1)
        layers = []
        for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            last = index == len(self.hidden)
            deviation = 0.02 if last else 1 / math.sqrt(inputs)
            noise = jax.random.normal(jax.random.fold_in(key, index), (copies * inputs * outputs,))
            layer = {"kernel": deviation * noise.reshape(copies, inputs, outputs)}
            if self.bias:
                layer["bias"] = jnp.zeros((copies, outputs))
            layers.append(layer)
        return tuple(layers)

    def __call__(
        self, params: HeadParams, features: Float[Array, "*batch D"]
    ) -> Float[Array, "*batch T"]:
        """All heads on the same features."""
        copies = params[0]["kernel"].shape[0]
        shared = jnp.broadcast_to(features, (copies, *features.shape))
        return self.of_copies(params, shared)

    def of_copies(
        self, params: HeadParams, features: Float[Array, "T *batch D"]
    ) -> Float[Array, "*batch T"]:
        """Each head on features of its own."""
        batch = features.shape[1:-1]
        x = features.reshape(features.shape[0], math.prod(batch), features.shape[-1])
        x = x.astype(jnp.float32)
        for index, layer in enumerate(params):
            x = x @ layer["kernel"].astype(jnp.float32)
            if "bias" in layer:
                x += layer["bias"].astype(jnp.float32)[:, None]
            if index < len(params) - 1:
                x = jax.nn.silu(x)
        if self.output == "sigmoid":
            x = jax.nn.sigmoid(x)
        return jnp.moveaxis(x[..., 0], 0, -1).reshape(*batch, features.shape[0])
