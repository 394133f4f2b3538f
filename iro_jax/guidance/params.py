"""What the functions of a guided search get as `params`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from iro_jax.models import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuidedParams:
    """Arrays only, so that one compiled search serves any of them.

    Attributes:
      policy: weights of the policy.
      scorer: whatever the scorer wants; None for `NoScore`.
      stop_table: of the policy's stop strings, `[states, V]`; see `iro_jax.models.stop`.
      noise: Gumbel noise to draw with instead of the keys' own, by answer position and
        candidate, `[S * L, P, U, V]`.
    """

    policy: Params
    scorer: Any = None
    stop_table: Int[Array, "states V"] | None = None
    noise: Float[Array, "positions P U V"] | None = None
