"""Means with intervals: the bootstrap over prompts, paired comparisons, tables of them.

What is resampled is always the prompt: it is the unit that a result should generalise over.
Results of several seeds come as `[seeds, n]`; each prompt's mean over the seeds is taken first.
Seeds are too few to resample. Everything here is a function of its arguments, the bootstrap's
own seed included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy  # loads `scipy.stats`, which takes half a second, where it is used
from jaxtyping import Float, Shaped
from numpy.typing import ArrayLike

# The resamples drawn at once: bounds the memory, and does not change the result.
_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its percentile bootstrap interval; `f"{interval:.2f}"` prints it."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the estimate differs from zero, in either direction."""
        return self.low > 0 or self.high < 0

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.mean:{spec}} ({self.low:{spec}} to {self.high:{spec}})"

    def __str__(self) -> str:
        return format(self, "")


def bootstrap(
    values: Shaped[ArrayLike, "*seeds n"],
    *,
    seed: int = 0,
    samples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """The mean over prompts.

    Args:
      values: one number a prompt, `[n]`, or one a seed and prompt, `[seeds, n]`.
      seed: of the resampling.
      samples: how often the prompts are resampled.
      level: the share of the bootstrap distribution between `low` and `high`.

    Raises:
      ValueError: fewer than two prompts, or a number that is not finite.
    """
    return _interval(_mean, [_per_prompt(values)], seed, samples, level)


def paired(
    a: Shaped[ArrayLike, "*seeds n"],
    b: Shaped[ArrayLike, "*seeds n"],
    *,
    seed: int = 0,
    samples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """The mean over prompts of `a - b`, two methods on the same prompts.

    The arguments are those of `bootstrap`; the numbers of seeds may differ.

    Raises:
      ValueError: as `bootstrap`, or the numbers of prompts differ.
    """
    first, second = _aligned(a, b)
    return _interval(_mean, [first - second], seed, samples, level)


def gap_closed(
    base: Shaped[ArrayLike, "*seeds n"],
    method: Shaped[ArrayLike, "*seeds n"],
    best: Shaped[ArrayLike, "*seeds n"],
    *,
    seed: int = 0,
    samples: int = 10_000,
    level: float = 0.95,
) -> Interval | None:
    """The share of the gap from `base` to `best` that `method` closes.

    It is the ratio of mean differences, (method - base) / (best - base), with all three
    resampled together. Where the interval of the gap itself includes zero, there is nothing
    to take a share of, and the result is None. Arguments and errors are those of `paired`.
    """
    columns = _aligned(base, method, best)
    base, _, best = columns
    if not _interval(_mean, [best - base], seed, samples, level).excludes_zero:
        return None
    return _interval(_ratio, columns, seed, samples, level)


def closes(
    base: Shaped[ArrayLike, "*seeds n"],
    method: Shaped[ArrayLike, "*seeds n"],
    best: Shaped[ArrayLike, "*seeds n"],
    share: float,
    *,
    seed: int = 0,
    samples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """By how much `method` closes more than `share` of the gap from `base` to `best`.

    The mean of (method - base) - share * (best - base), which needs no division: `method` closes
    that share if the interval lies above zero. Arguments and errors are those of `paired`.
    """
    first, second, third = _aligned(base, method, best)
    excess = (second - first) - share * (third - first)
    return _interval(_mean, [excess], seed, samples, level)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with its first column on the left and the others, the numbers, on the right.

    Raises:
      ValueError: a row that is not as long as the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"A row of this table has {len(header)} cells. Got: {tuple(row)}")

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"

    rule = "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)]) + "\n"


def _mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(values, axis=axis)


def _ratio(base: np.ndarray, method: np.ndarray, best: np.ndarray, axis: int = -1) -> np.ndarray:
    start = np.mean(base, axis=axis)
    gain, gap = np.mean(method, axis=axis) - start, np.mean(best, axis=axis) - start
    # A resample without a gap, which binary rewards may have, says nothing about a share.
    return np.divide(gain, gap, out=np.full_like(gain, np.inf), where=gap != 0)


def _per_prompt(values: Shaped[ArrayLike, "*seeds n"]) -> Float[np.ndarray, " n"]:
    array = np.asarray(values, np.float64)
    if array.ndim not in (1, 2) or array.shape[-1] < 2 or not array.size:
        raise ValueError(
            "A bootstrap over prompts needs values [n] or [seeds, n] of at least two prompts."
            f" Got: shape {array.shape}"
        )
    if not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"Values must be finite. Got: {array[place]} at index {place}")
    return array if array.ndim == 1 else array.mean(axis=0)


def _aligned(*columns: Shaped[ArrayLike, "*seeds n"]) -> list[Float[np.ndarray, " n"]]:
    arrays = [_per_prompt(column) for column in columns]
    if len({len(array) for array in arrays}) > 1:
        sizes = [len(array) for array in arrays]
        raise ValueError(f"Paired values must be of the same prompts. Got: {sizes} of them")
    return arrays


def _interval(
    statistic: Callable[..., np.ndarray],
    columns: Sequence[Float[np.ndarray, " n"]],
    seed: int,
    samples: int,
    level: float,
) -> Interval:
    result = scipy.stats.bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=samples,
        batch=_BATCH,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(float(statistic(*columns)), float(low), float(high))
