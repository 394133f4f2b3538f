"""Figures of methods side by side: win rates between them, best-of-n curves, variety, distance.

Everything is per prompt, so that `bootstrap` and `paired` give its intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy  # loads its parts where they are used
from jaxtyping import Float
from numpy.typing import ArrayLike


def wins(
    first: Float[ArrayLike, " *n"], second: Float[ArrayLike, " *n"]
) -> Float[np.ndarray, " *n"]:
    """1 where the first is higher, 0 where the second is, 1/2 for a tie.

    The mean over prompts is the win rate of the first against the second.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return (a > b) + 0.5 * (a == b)


def expected_best(rewards: Float[ArrayLike, " N"], n: int) -> float:
    """The mean reward of best-of-n, from N samples: over all their subsets of n.

    Unbiased, and with less noise than one draw of n.

    >>> round(expected_best([0.0, 1.0, 2.0], 2), 3)  # the best of 01, 02, 12
    1.667

    Raises:
      ValueError: n is not in 1..N.
    """
    ordered = np.sort(np.asarray(rewards, np.float64))
    count = len(ordered)
    if not 1 <= n <= count:
        raise ValueError(f"n must be in 1..{count}, the number of samples. Got: {n}")
    # The i-th smallest is the best of a subset whose others are among the i - 1 below it.
    below = scipy.special.comb(np.arange(count), n - 1)
    return float(ordered @ below / scipy.special.comb(count, n))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """The share of different ones among all sequences of n words; 0 where there are none."""
    found = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(found)) / len(found) if found else 0.0


def best_of_n_divergence(n: int) -> float:
    """The bound log n - (n - 1) / n on KL(best-of-n || policy), in nats.

    It is the divergence itself where no two answers have the same reward. Reference: Beirami et
    al., Theoretical guarantees on the best-of-n alignment policy (arXiv 2401.01879).
    """
    if n < 1:
        raise ValueError(f"n must be at least 1. Got: {n}")
    return math.log(n) - (n - 1) / n


def search_divergence(candidates: int, successors: int, steps: int) -> float:
    """The bound log U + (steps - 1) log B on KL(chunk-level search || policy), in nats.

    It holds whatever the search selects and whichever finalist it answers: one that it finds must
    have been sampled. An answer's first chunk is among U samples; after that, the expected number
    of candidates that begin like it grows by at most B times the next chunk's probability. So an
    answer comes up at most U B^(steps - 1) times as often as the policy gives it.

    >>> round(search_divergence(16, 4, 1), 2) == round(math.log(16), 2)
    True

    Args:
      candidates: U, the samples of the first step.
      successors: B, of every beam in later steps.
      steps: chunks of the longest answer.
    """
    if min(candidates, successors, steps) < 1:
        raise ValueError(
            "candidates, successors and steps must be at least 1."
            f" Got: {candidates}, {successors}, {steps}"
        )
    return math.log(candidates) + (steps - 1) * math.log(successors)
