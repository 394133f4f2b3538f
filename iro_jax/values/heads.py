"""Small networks from a hidden state to a value, T of them at once.

What they give before the output is turned into a value (`Head.logits`) is what the losses of
`iro_jax.values.losses` want. Here too: heads put together (`stack`), taken apart (`select`) and
freed of a normalisation of the reward (`Head.fold`) or of
their features (`fold_inputs`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from numpy.typing import ArrayLike

HeadParams: TypeAlias = tuple[dict[str, Array], ...]
"""One dictionary a layer: `kernel` `[T, inputs, outputs]`, and `bias` `[T, outputs]` or none."""

Output: TypeAlias = Literal["identity", "sigmoid", "categorical"]


@dataclasses.dataclass(frozen=True)
class Head:
    """T heads of one shape. Letters: T heads, D width of the features, A atoms. All in f32.

    Attributes:
      hidden: widths of the hidden layers (SiLU); none makes the heads linear.
      bias: whether layers have biases; linear heads without one open in `transformers`.
      output: what the last layer gives: `identity` the value; `sigmoid` the logit of a
        verifiable reward (equation 49); `categorical` the logits of a distribution of the
        final reward (Q#), whose expectation is the value.
      num_atoms: A, for `categorical`.
      support: the lowest and the highest atom; the others lie evenly between them.
      eta: what the head gives is log E exp(eta r), as Q# wants it (arXiv 2502.20548), instead of
        the expectation E r; for outputs that are distributions of the reward.
    """

    hidden: tuple[int, ...] = ()
    bias: bool = True
    output: Output = "identity"
    num_atoms: int = 11
    support: tuple[float, float] = (0.0, 1.0)
    eta: float | None = None

    def __post_init__(self):
        if self.output not in get_args(Output):
            raise ValueError(f"output must be one of {get_args(Output)}. Got: {self.output!r}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"Hidden layers need a width of at least 1. Got: {self.hidden}")
        if self.num_atoms < 2:
            raise ValueError(f"num_atoms must be at least 2. Got: {self.num_atoms}")
        low, high = self.support
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"support must be (low, high) with low < high. Got: {self.support}")
        if self.eta is not None and (self.output == "identity" or not 0 < self.eta < math.inf):
            raise ValueError(
                "eta must be positive, and the output a distribution of the reward."
                f" Got: eta={self.eta}, output={self.output!r}"
            )

    @property
    def atoms(self) -> Float[Array, " A"]:
        """The rewards that a categorical head tells apart."""
        return jnp.linspace(*self.support, self.num_atoms, dtype=jnp.float32)

    def init(self, key: Key[Array, ""], width: int, copies: int = 1) -> HeadParams:
        """Random hidden layers and a last layer of deviation 0.02, for T = `copies` heads."""
        sizes = (width, *self.hidden, self.num_atoms if self.output == "categorical" else 1)
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
        """The values of all heads on the same features."""
        return self.values(self.logits(params, features))

    def of_copies(
        self, params: HeadParams, features: Float[Array, "T *batch D"]
    ) -> Float[Array, "*batch T"]:
        """The values of each head on features of its own."""
        return self.values(self.logits_of_copies(params, features))

    def logits(
        self, params: HeadParams, features: Float[Array, "*batch D"]
    ) -> Float[Array, "*batch T"] | Float[Array, "*batch T A"]:
        """What the last layers of all heads give on the same features.

        Returns:
          `[*batch, T]`: values (`identity`) or logits (`sigmoid`); `[*batch, T, A]` for
          `categorical`.
        """
        copies = params[0]["kernel"].shape[0]
        return self.logits_of_copies(params, jnp.broadcast_to(features, (copies, *features.shape)))

    def logits_of_copies(
        self, params: HeadParams, features: Float[Array, "T *batch D"]
    ) -> Float[Array, "*batch T"] | Float[Array, "*batch T A"]:
        """As `logits`, of each head on features of its own."""
        copies, *batch, width = features.shape
        x = features.reshape(copies, math.prod(batch), width).astype(jnp.float32)
        for index, layer in enumerate(params):
            x = x @ layer["kernel"].astype(jnp.float32)
            if "bias" in layer:
                x += layer["bias"].astype(jnp.float32)[:, None]
            if index < len(params) - 1:
                x = jax.nn.silu(x)
        x = jnp.moveaxis(x, 0, 1).reshape(*batch, copies, x.shape[-1])
        return x if self.output == "categorical" else x[..., 0]

    def values(
        self, logits: Float[Array, "*batch T"] | Float[Array, "*batch T A"]
    ) -> Float[Array, "*batch T"]:
        """The values that `logits` stand for, or with `eta` their log E exp(eta r)."""
        if self.eta is not None and self.output == "sigmoid":
            return jax.nn.softplus(logits + self.eta) - jax.nn.softplus(logits)
        if self.eta is not None:
            return jax.nn.logsumexp(
                jax.nn.log_softmax(logits, axis=-1) + self.eta * self.atoms, axis=-1
            )
        if self.output == "sigmoid":
            return jax.nn.sigmoid(logits)
        if self.output == "categorical":
            return jnp.sum(jax.nn.softmax(logits, axis=-1) * self.atoms, axis=-1)
        return logits

    def fold(self, params: HeadParams, mean: float, std: float) -> HeadParams:
        """Heads that were fitted to (reward - mean) / std, made to give values of the reward.

        Returns:
          The parameters with v * std + mean absorbed by the last layer.

        Raises:
          ValueError: the output is not `identity`, std is not positive, or a mean other than
            zero has no bias to go to.
        """
        if self.output != "identity":
            raise ValueError(f"Only identity outputs can be rescaled. Got: {self.output!r}")
        if not 0 < std < math.inf or not math.isfinite(mean):
            raise ValueError(f"std must be positive, and both finite. Got: mean={mean}, std={std}")
        *layers, last = params
        folded = {name: array * std for name, array in last.items()}
        if "bias" in last:
            folded["bias"] += mean
        elif mean:
            raise ValueError(f"Heads without a bias can absorb a scale only. Got: mean={mean}")
        return (*layers, folded)


def fold_inputs(
    params: HeadParams, mean: Float[ArrayLike, " D"], std: Float[ArrayLike, " D"]
) -> HeadParams:
    """Heads for features x that were fitted to (x - mean) / std.

    Raises:
      ValueError: a mean other than zero has no bias to go to.
    """
    first, *others = params
    kernel = first["kernel"] / jnp.asarray(std)[None, :, None]
    folded = {"kernel": kernel}
    if "bias" in first:
        folded["bias"] = first["bias"] - jnp.einsum("d,tdo->to", jnp.asarray(mean), kernel)
    elif np.any(mean):
        raise ValueError("Heads without a bias can absorb a scale only. Got: a mean")
    return (folded, *others)


def stack(heads: Sequence[HeadParams]) -> HeadParams:
    """The heads of several parameters of one shape as one: T is the sum of theirs.

    Raises:
      ValueError: there is none, or their layers differ.
    """
    described = [
        [{name: array.shape[1:] for name, array in layer.items()} for layer in params]
        for params in heads
    ]
    if not described or any(other != described[0] for other in described):
        raise ValueError(f"Heads of one shape can be stacked, at least one. Got: {described}")
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *heads)


def select(params: HeadParams, t: int) -> HeadParams:
    """Head `t` alone, with T = 1.

    Raises:
      IndexError: there is no such head.
    """
    copies = params[0]["kernel"].shape[0]
    if not 0 <= t < copies:
        raise IndexError(f"t must be in 0..{copies - 1}. Got: {t}")
    return jax.tree.map(lambda leaf: leaf[t : t + 1], params)
