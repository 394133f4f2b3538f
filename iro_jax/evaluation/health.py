"""Health of a value function: what it says about held-out rollouts, against their rewards.

A value function predicts the final reward from every prefix. `measure_health` compares the
predictions with what happened: overall, by where in the answer they were made, and by how high
they are. `drift` compares its error on rollouts of the next iteration, which it guided, with that
on its own; `reward_gap` compares what the training reward gained with what a second reward, never
trained on, gained. Where data cannot tell (one rollout, equal rewards, a chunk that no answer
reaches), the result is None, never NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy  # loads `scipy.stats`, which takes half a second, where it is used
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import ArrayLike

from iro_jax.evaluation.statistics import Interval, bootstrap

# Numbers that agree to this share of their size are equal: networks compute in f32.
_EQUAL = 1e-5


@dataclasses.dataclass(frozen=True)
class Fit:
    """Predictions against the rewards that followed.

    Attributes:
      count: pairs of a prediction and a reward. With none of them everything else is None.
      bias: mean of prediction - reward.
      mean_squared_error: mean of (prediction - reward)^2.
      reward_variance: of the rewards in these pairs: the error of the best constant.
      r_squared: 1 - mean_squared_error / reward_variance; None where rewards are equal.
      pearson: correlation; None where predictions or rewards are equal.
      spearman: correlation of ranks; None likewise.
      within_prompt: Pearson correlation after each prompt's means are taken off both, which is
        what the choice between candidates of one prompt lives on; None where no prompt has
        rollouts that differ in both.
    """

    count: int
    bias: float | None = None
    mean_squared_error: float | None = None
    reward_variance: float | None = None
    r_squared: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    within_prompt: float | None = None


@dataclasses.dataclass(frozen=True)
class Bin:
    """Prefixes whose predictions are alike: their number, mean prediction and mean reward."""

    count: int
    predicted: float
    reward: float


@dataclasses.dataclass(frozen=True)
class Health:
    """One value function on held-out rollouts of one policy.

    Chunk 0 is the bare prompt; chunk k >= 1 is tokens (k - 1) * L + 1 to k * L of the answer.

    Attributes:
      chunk_length: L, in tokens.
      num_prompts, num_rollouts, num_prefixes: what was looked at.
      mean_reward, reward_variance: over rollouts.
      within_prompt_variance, between_prompt_variance: they add up to `reward_variance`; what a
        value function can know at the bare prompt is at most the second.
      overall: at all prefixes together; long answers count more, as in (7).
      prompt: at the bare prompt.
      answer: at the complete answer.
      positions: by chunk, at all prefixes that end in it.
      boundaries: by chunk, where the search scores: at the end of the chunk, or of an answer that
        ends in it.
      deciles: all prefixes by predicted value, lowest first; fewer than ten where predictions
        are equal.
      calibration_error: expected calibration error, the mean over prefixes of
        |mean prediction - mean reward| of their decile.
    """

    chunk_length: int
    num_prompts: int
    num_rollouts: int
    num_prefixes: int
    mean_reward: float
    reward_variance: float
    within_prompt_variance: float
    between_prompt_variance: float
    overall: Fit
    prompt: Fit
    answer: Fit
    positions: tuple[Fit, ...]
    boundaries: tuple[Fit, ...]
    deciles: tuple[Bin, ...]
    calibration_error: float

    def to_json(self) -> dict[str, Any]:
        """What `json` can write: dictionaries, sequences, numbers and None."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Health:
        """The inverse of `to_json`."""
        single = {name: Fit(**fields[name]) for name in ("overall", "prompt", "answer")}
        several = {
            name: tuple(Fit(**fit) for fit in fields[name]) for name in ("positions", "boundaries")
        }
        deciles = tuple(Bin(**group) for group in fields["deciles"])
        return cls(**{**fields, **single, **several, "deciles": deciles})


def measure_health(
    values: Float[np.ndarray, "n length"],
    mask: Bool[np.ndarray, "n length"],
    rewards: Float[np.ndarray, " n"],
    prompt_ids: Sequence[str] | Shaped[np.ndarray, " n"],
    chunk_length: int,
) -> Health:
    """Compares a value function's predictions with the rewards of n rollouts.

    Args:
      values: V after each number of answer tokens: column 0 is the bare prompt, the last one that
        `mask` names is the complete answer. Pad to the longest answer possible, so that the
        chunks of different iterations are the same ones.
      mask: which values exist; a row is true up to its answer's length, column 0 included.
      rewards: of the complete answers.
      prompt_ids: which prompt each rollout belongs to.
      chunk_length: L, in tokens.

    Raises:
      ValueError: shapes that do not fit, no rollouts, a mask with gaps, or a number that is not
        finite.
    """
    values, rewards = np.asarray(values, np.float64), np.asarray(rewards, np.float64)
    mask = np.asarray(mask, bool)
    prompts = _codes(prompt_ids)
    _check(values, mask, rewards, prompts, chunk_length)

    rows = np.arange(len(values))
    last = mask.sum(axis=1) - 1
    row, column = np.nonzero(mask)
    everywhere = (values[row, column], rewards[row], prompts[row])
    chunk_of = -(-column // chunk_length)
    num_chunks = -(-(values.shape[1] - 1) // chunk_length)

    def at(ends: Int[np.ndarray, " n"], kept: Bool[np.ndarray, " n"] | None = None) -> Fit:
        kept = np.ones(len(rows), bool) if kept is None else kept
        return _fit(values[rows, ends][kept], rewards[kept], prompts[kept])

    def at_boundary(chunk: int) -> Fit:
        return at(np.minimum(chunk * chunk_length, last), last > (chunk - 1) * chunk_length)

    within = _centred(rewards, prompts)
    deciles = _deciles(*everywhere[:2])
    gaps = [group.count * abs(group.predicted - group.reward) for group in deciles]
    return Health(
        chunk_length=chunk_length,
        num_prompts=len(np.unique(prompts)),
        num_rollouts=len(rows),
        num_prefixes=len(row),
        mean_reward=float(rewards.mean()),
        reward_variance=float(rewards.var()),
        within_prompt_variance=float(np.mean(within**2)),
        between_prompt_variance=float(np.var(rewards - within)),
        overall=_fit(*everywhere),
        prompt=at(np.zeros_like(last)),
        answer=at(last),
        positions=tuple(
            _fit(*(x[chunk_of == chunk] for x in everywhere)) for chunk in range(num_chunks + 1)
        ),
        boundaries=tuple(map(at_boundary, range(num_chunks + 1))),
        deciles=deciles,
        calibration_error=float(sum(gaps) / len(row)),
    )


def errors_by_prompt(
    values: Float[np.ndarray, "n length"],
    mask: Bool[np.ndarray, "n length"],
    rewards: Float[np.ndarray, " n"],
    prompt_ids: Sequence[str] | Shaped[np.ndarray, " n"],
) -> dict[Any, float]:
    """Mean squared error over each prompt's prefixes: what `statistics` makes intervals of.

    The arguments are those of `measure_health`. Prompts come in the order of their ids.
    """
    errors = np.asarray(values, np.float64) - np.asarray(rewards, np.float64)[:, None]
    squares = np.where(mask, np.square(errors), 0.0)
    ids, codes = np.unique(np.asarray(prompt_ids), return_inverse=True)
    means = np.bincount(codes, squares.sum(1)) / np.bincount(codes, np.sum(mask, axis=1))
    return dict(zip(ids.tolist(), means.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Drift:
    """What changes for a value function when the policy that it was fitted on moves on.

    Every number is that on the new rollouts minus that on its own: a rising error says that the
    new policy's answers lie outside what the fit has seen; a rising bias says that the value
    function thinks too well of the answers it steered towards. None where one side is None.

    Attributes:
      mean_squared_error, bias: at all prefixes together.
      r_squared: the same with each side's error in units of its own reward variance.
      error_by_chunk, bias_by_chunk: at all prefixes that end in a chunk, chunk 0 the bare prompt.
    """

    mean_squared_error: float | None
    bias: float | None
    r_squared: float | None
    error_by_chunk: tuple[float | None, ...]
    bias_by_chunk: tuple[float | None, ...]


def drift(own: Health, following: Health) -> Drift:
    """The drift of one value function from its `own` rollouts to the `following` iteration's.

    By chunk as far as both reach: in a tokenizer that is not the policy's, the longest answers of
    two iterations may differ.

    Raises:
      ValueError: the chunks of the two have different lengths.
    """
    if own.chunk_length != following.chunk_length:
        raise ValueError(
            "Both must be measured with the same chunk length."
            f" Got: {own.chunk_length} and {following.chunk_length}"
        )
    pairs = list(zip(own.positions, following.positions, strict=False))
    return Drift(
        mean_squared_error=_minus(
            following.overall.mean_squared_error, own.overall.mean_squared_error
        ),
        bias=_minus(following.overall.bias, own.overall.bias),
        r_squared=_minus(following.overall.r_squared, own.overall.r_squared),
        error_by_chunk=tuple(_minus(b.mean_squared_error, a.mean_squared_error) for a, b in pairs),
        bias_by_chunk=tuple(_minus(b.bias, a.bias) for a, b in pairs),
    )


@dataclasses.dataclass(frozen=True)
class RewardGap:
    """Training reward and second reward over iterations; entry 0 is the base policy.

    Attributes:
      training, second: means over prompts.
      gap: gain of the training reward - gain of the second one, each over the base policy and in
        standard deviations of that reward among the base policy's answers. Both gain less
        than they seem to when only one of them is optimised, so that some gap is expected;
        a gap that grows while the second reward stands still or falls is overoptimisation.
        None where one of the rewards is the same for all of the base policy's answers.
    """

    training: tuple[Interval, ...]
    second: tuple[Interval, ...]
    gap: tuple[Interval | None, ...]


def reward_gap(
    training: Float[ArrayLike, "iterations n"], second: Float[ArrayLike, "iterations n"]
) -> RewardGap:
    """Measures overoptimisation of the training reward.

    Args:
      training: rewards that values were trained on, of one answer to each of n prompts; row 0 is
        the base policy, each later row an iteration.
      second: rewards of the same answers by a model that training never saw.

    Raises:
      ValueError: shapes that differ, fewer than two prompts, or a number that is not finite.
    """
    training, second = np.asarray(training, np.float64), np.asarray(second, np.float64)
    if training.shape != second.shape or training.ndim != 2:
        raise ValueError(
            "Both rewards must be [iterations, n] of the same answers."
            f" Got: {training.shape} and {second.shape}"
        )

    def gain(rewards: Float[np.ndarray, "iterations n"]) -> Float[np.ndarray, "iterations n"]:
        return (rewards - rewards[0]) / rewards[0].std()

    known = not (_constant(training[0]) or _constant(second[0]))
    return RewardGap(
        training=tuple(map(bootstrap, training)),
        second=tuple(map(bootstrap, second)),
        gap=tuple(map(bootstrap, gain(training) - gain(second)))
        if known
        else (None,) * len(training),
    )


def _codes(prompt_ids: Sequence[str] | Shaped[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.unique(np.asarray(prompt_ids), return_inverse=True)[1]


def _check(
    values: np.ndarray,
    mask: np.ndarray,
    rewards: np.ndarray,
    prompts: np.ndarray,
    chunk_length: int,
) -> None:
    if chunk_length < 1:
        raise ValueError(f"chunk_length must be at least 1. Got: {chunk_length}")
    shapes = [values.shape, mask.shape, rewards.shape, prompts.shape]
    n = len(rewards) if rewards.ndim else 0
    if values.ndim != 2 or shapes != [values.shape, values.shape, (n,), (n,)] or values.size == 0:
        raise ValueError(
            "values and mask must be [n, length], rewards and prompt_ids [n], n and length at"
            f" least 1. Got: {', '.join(map(str, shapes))}"
        )
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        broken = ~mask[:, 0] | (mask[:, 1:] & ~mask[:, :-1]).any(axis=1)
        raise ValueError(
            "A row of the mask must be true from the bare prompt to the end of the answer."
            f" Got: gaps in row {int(np.argmax(broken))}"
        )
    for name, finite in (
        ("values", np.where(mask, np.isfinite(values), True).all(axis=1)),
        ("rewards", np.isfinite(rewards)),
    ):
        if not finite.all():
            raise ValueError(
                f"{name} must be finite. Got: NaN or infinity in row {int(np.argmin(finite))}"
            )


def _fit(
    values: Float[np.ndarray, " n"],
    rewards: Float[np.ndarray, " n"],
    prompts: Int[np.ndarray, " n"],
) -> Fit:
    if not len(values):
        return Fit(count=0)
    error = float(np.mean((values - rewards) ** 2))
    variance = float(rewards.var())
    inner_values, inner_rewards = _centred(values, prompts), _centred(rewards, prompts)
    same_for_each_prompt = _zero(inner_values, values) or _zero(inner_rewards, rewards)
    equal = _constant(values) or _constant(rewards)
    return Fit(
        count=len(values),
        bias=float(np.mean(values - rewards)),
        mean_squared_error=error,
        reward_variance=variance,
        r_squared=None if _constant(rewards) else 1 - error / variance,
        pearson=None if equal else float(scipy.stats.pearsonr(values, rewards).statistic),
        spearman=None if equal else float(scipy.stats.spearmanr(values, rewards).statistic),
        within_prompt=None
        if same_for_each_prompt
        else float(scipy.stats.pearsonr(inner_values, inner_rewards).statistic),
    )


def _centred(x: Float[np.ndarray, " n"], prompts: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """What is left of `x` after its prompt's mean is taken off."""
    counts = np.maximum(np.bincount(prompts), 1)
    return x - (np.bincount(prompts, x) / counts)[prompts]


def _zero(x: Float[np.ndarray, " n"], scale: Float[np.ndarray, " n"]) -> bool:
    return bool(np.abs(x).max() <= _EQUAL * np.abs(scale).max())


def _constant(x: Float[np.ndarray, " n"]) -> bool:
    return bool(np.ptp(x) <= _EQUAL * np.abs(x).max())


def _deciles(values: Float[np.ndarray, " n"], rewards: Float[np.ndarray, " n"]) -> tuple[Bin, ...]:
    """Ten groups of equal size; equal predictions are never divided."""
    edges = np.quantile(values, np.arange(1, 10) / 10)
    groups = np.searchsorted(edges, values, side="left")
    return tuple(
        Bin(int(inside.sum()), float(values[inside].mean()), float(rewards[inside].mean()))
        for inside in (groups == group for group in np.unique(groups))
    )


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
