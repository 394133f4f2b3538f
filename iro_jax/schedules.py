"""The temperatures beta_t of the value functions: what a config may say, and Theorem 1's choice.

The score of a prefix is `sum_t V_t / beta_t` (equation 8), so a beta has the unit of the reward,
and a smaller one trusts its value function more. Iterations count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

Spec: TypeAlias = float | Sequence[float] | Mapping[str, Any]
"""A number (the same for all iterations), one number an iteration, or Theorem 1's by name."""

_FORMS = (
    "a number, one number for each iteration, {'name': 'theorem', 'omega': ...} or"
    " {'name': 'theorem', 'log_concentrability': ..., 'r_max': ...}"
)


def theorem(t: int, omega: float) -> float:
    """beta_t = sqrt(t + 1) / omega of Theorem 1.

    Args:
      t: the iteration, from 0.
      omega: `theorem_omega`, or a number found by trying; its unit is one over the reward's.
    """
    return math.sqrt(t + 1) / omega


def theorem_omega(log_concentrability: float, r_max: float, num_iterations: int) -> float:
    """omega = sqrt(2 log C_ST / (r_max^2 log T)) of Theorem 1.

    Args:
      log_concentrability: log C_ST, the largest log-ratio of how often the best policy and the
        base policy visit a state and take an action there. It is taken as a logarithm because
        C_ST itself overflows: where the best policy writes one answer, log C_ST is minus that
        answer's log-probability under the base policy.
      r_max: rewards lie in `[0, r_max]`.
      num_iterations: T, at least 2.

    Raises:
      ValueError: T below 2, where log T is 0; a log C_ST or an r_max that is not positive.
    """
    if num_iterations < 2:
        raise ValueError(f"Theorem 1's omega needs at least 2 iterations. Got: {num_iterations}")
    _positive(log_concentrability, "log_concentrability")
    _positive(r_max, "r_max")
    return math.sqrt(2 * log_concentrability / math.log(num_iterations)) / r_max


def betas(spec: Spec, num_iterations: int) -> tuple[float, ...]:
    """The beta of every iteration.

    Args:
      spec: a number, the same for all iterations; one number for each iteration, such as the
        paper's `(1, 2, 2.5)`; or a mapping (a `ConfigDict` too) `{"name": "theorem", ...}` with
        either `omega`, or `log_concentrability` and `r_max` from which omega is computed.
      num_iterations: T, how many betas are returned, at least 1.

    Raises:
      ValueError: another kind of `spec`, unknown or missing fields, more or fewer numbers than
        iterations, or a number that is not positive and finite.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1. Got: {num_iterations}")
    if isinstance(spec, Real):
        return (_positive(spec, "beta"),) * num_iterations
    # A ConfigDict is no `Mapping`, but has its methods.
    if hasattr(spec, "keys"):
        omega = _omega(spec, num_iterations)
        return tuple(theorem(t, omega) for t in range(num_iterations))
    if isinstance(spec, str) or not isinstance(spec, Sequence):
        raise ValueError(f"betas must be {_FORMS}. Got: {spec!r}")
    if len(spec) != num_iterations:
        raise ValueError(
            f"betas must list one number for each of the {num_iterations} iterations."
            f" Got: {len(spec)} numbers, {tuple(spec)}"
        )
    return tuple(_positive(beta, f"betas[{t}]") for t, beta in enumerate(spec))


def _omega(spec: Any, num_iterations: int) -> float:
    fields = dict(spec)
    name, given = fields.pop("name", None), set(fields)
    if name == "theorem" and given == {"omega"}:
        return _positive(fields["omega"], "omega")
    if name == "theorem" and given == {"log_concentrability", "r_max"}:
        return theorem_omega(**fields, num_iterations=num_iterations)
    raise ValueError(f"betas must be {_FORMS}. Got: { ({'name': name} | fields)!r}")


def _positive(number: Any, name: str) -> float:
    real = isinstance(number, Real) and not isinstance(number, bool)
    if not real or not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive finite number. Got: {number!r}")
    return float(number)
