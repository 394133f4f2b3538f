"""Win rates with the judge's taste for long answers taken out, as AlpacaEval 2 defines them.

    logit P(win on i) = a tanh((len_ref_i - len_i) / sd) + c d_i + b

with d_i the difficulty of instruction i and sd the standard deviation of the length differences.
The length-controlled win rate is the mean of sigmoid(c d_i + b): what the judge would have said,
had both answers been of one length. Source: Dubois et al., "Length-Controlled AlpacaEval: A Simple
Way to Debias Automatic Evaluators" (arXiv 2404.04475).

The fit also sees answers of the reference model itself, asked to be concise or verbose, in rows of
small weight whose b is 0: they say what length alone is worth to the judge, so that a model whose
answers are all longer than the reference's cannot have its quality mistaken for its length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy  # loads its parts where they are used
from jaxtyping import Float

# AlpacaEval 2 chooses the inverse strength of its L1 penalty among ten powers from 1e-4 to 1e4 by
# cross-validation; this is the one that comes closest to what it has published.
INVERSE_STRENGTH = 10 ** (4 / 3)


@dataclasses.dataclass(frozen=True)
class JudgedAnswer:
    """One answer beside the reference's.

    Attributes:
      instruction: its id, by which difficulties are looked up.
      preference: for the answer over the reference's, 0 to 1; None where the judge gave none.
      length: of the answer, in characters.
      reference_length: of the reference's answer, in characters.
    """

    instruction: str
    preference: float | None
    length: int
    reference_length: int


@dataclasses.dataclass(frozen=True)
class GamedBaselines:
    """Answers of the reference model when asked to be concise or verbose, n rows of all of them.

    Attributes:
      length: tanh of length differences, in deviations of each baseline's own, `[n]`.
      difficulty: of the instructions, `[n]`.
      preference_times_length: sum over rows of preference times `length`.
      preference_times_difficulty: sum over rows of preference times `difficulty`.
    """

    length: Float[np.ndarray, " n"]
    difficulty: Float[np.ndarray, " n"]
    preference_times_length: float
    preference_times_difficulty: float


@dataclasses.dataclass(frozen=True)
class LengthModel:
    """The coefficients of one model against the reference: a, c and b of the formula above."""

    length: float
    difficulty: float
    bias: float

    def win_rate(self, difficulties: Float[np.ndarray, " n"]) -> float:
        """The length-controlled win rate on instructions of these difficulties, in percent."""
        logits = self.difficulty * np.asarray(difficulties, np.float64) + self.bias
        return 100 * float(scipy.special.expit(logits).mean())


def win_rate(answers: Sequence[JudgedAnswer]) -> float:
    """The mean preference for the answers, in percent; answers that were not judged do not count.

    Raises:
      ValueError: no answer was judged, or a preference is not between 0 and 1.
    """
    return 100 * float(np.mean([preference for _, preference in _judged(answers)]))


def standardised_lengths(
    lengths: Sequence[int], reference_lengths: Sequence[int]
) -> Float[np.ndarray, " n"]:
    """tanh of the reference's length less the answer's, in standard deviations; 0 if all are equal.

    Args:
      lengths: of one model's answers, in characters.
      reference_lengths: of the reference's answers to the same instructions.
    """
    difference = np.asarray(reference_lengths, np.float64) - np.asarray(lengths, np.float64)
    deviation = difference.std(ddof=1) if len(difference) > 1 else 0.0
    return np.tanh(difference / deviation) if deviation > 0 else np.zeros_like(difference)


def fit_length_model(
    answers: Sequence[JudgedAnswer],
    difficulties: Mapping[str, float],
    gamed: GamedBaselines | None = None,
    *,
    gamed_weight: float = 0.1,
    inverse_strength: float = INVERSE_STRENGTH,
) -> LengthModel:
    """The coefficients of one model, by logistic regression with an L1 penalty.

    Args:
      answers: of one model; those that were not judged take part in sd only.
      difficulties: d_i by instruction. AlpacaEval's own fits go by the row's position instead,
        which gives every row after a missing one the difficulty of its neighbour.
      gamed: the gamed baselines' rows, where the judge saw them.
      gamed_weight: of each of their rows.
      inverse_strength: of the penalty; the larger, the weaker.

    Raises:
      ValueError: no answer was judged, a preference is not between 0 and 1, an instruction comes
        twice, or one has no difficulty.
    """
    judged = _judged(answers)
    ids = [answer.instruction for answer in answers]
    if len(set(ids)) < len(ids):
        twice = next(one for number, one in enumerate(ids) if one in ids[:number])
        raise ValueError(f"A model answers every instruction once. Got {twice!r} more than once")
    if unknown := [one for one in ids if one not in difficulties]:
        raise ValueError(
            f"Every instruction needs a difficulty. Got: {unknown[0]!r}"
            f" and {len(unknown) - 1} more without one"
        )
    lengths = standardised_lengths(
        [answer.length for answer in answers], [answer.reference_length for answer in answers]
    )
    rows = [row for row, _ in judged]
    features = np.stack(
        [lengths[rows], [difficulties[ids[row]] for row in rows], np.ones(len(rows))], axis=1
    )
    weights = np.ones(len(rows))
    # All that the log-likelihood asks of the preferences.
    moments = np.asarray([preference for _, preference in judged]) @ features
    if gamed is not None:
        size = len(gamed.length)
        more = np.stack([gamed.length, gamed.difficulty, np.zeros(size)], axis=1)
        features = np.concatenate([features, more])
        weights = np.concatenate([weights, np.full(size, gamed_weight)])
        moments = moments + gamed_weight * np.asarray(
            [gamed.preference_times_length, gamed.preference_times_difficulty, 0.0]
        )
    return LengthModel(*map(float, _fit(features, weights, moments, 1 / inverse_strength)))


def length_controlled_win_rate(
    answers: Sequence[JudgedAnswer],
    difficulties: Mapping[str, float],
    gamed: GamedBaselines | None = None,
) -> float:
    """The length-controlled win rate of one model on the instructions that it answered, in percent.

    Arguments and errors are those of `fit_length_model`.
    """
    model = fit_length_model(answers, difficulties, gamed)
    return model.win_rate(np.asarray([difficulties[answer.instruction] for answer in answers]))


def _judged(answers: Sequence[JudgedAnswer]) -> list[tuple[int, float]]:
    """Rows and preferences of the answers that were judged."""
    found = [(row, a.preference) for row, a in enumerate(answers) if a.preference is not None]
    if not found:
        raise ValueError(f"No answer was judged. Got: {len(answers)} answers")
    for row, preference in found:
        if not 0 <= preference <= 1:
            name = answers[row].instruction
            raise ValueError(f"A preference is from 0 to 1. Got: {preference} for {name!r}")
    return found


def _fit(
    features: Float[np.ndarray, "n 3"],
    weights: Float[np.ndarray, " n"],
    moments: Float[np.ndarray, " 3"],
    penalty: float,
) -> Float[np.ndarray, " 3"]:
    """Minimises sum_i w_i log(1 + exp(eta_i)) - moments . x + penalty |x|_1.

    A coefficient is the difference of two that are not negative, so that the penalty is linear.
    """

    def objective(parts: np.ndarray) -> tuple[float, np.ndarray]:
        x = parts[:3] - parts[3:]
        logits = features @ x
        loss = weights @ np.logaddexp(0, logits) - moments @ x
        gradient = features.T @ (weights * scipy.special.expit(logits)) - moments
        total = float(loss + penalty * parts.sum())
        return total, np.concatenate([gradient, -gradient]) + penalty

    found = scipy.optimize.minimize(
        objective,
        np.zeros(6),
        jac=True,
        bounds=[(0, None)] * 6,
        method="L-BFGS-B",
        options={"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-10},
    )
    return found.x[:3] - found.x[3:]
