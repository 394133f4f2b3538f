"""Algorithm 3 where everything can be written down: policies and rewards as tables over a tree.

A prompt's answers form a tree; where it is small, the values of a policy are computed instead
of fitted, and what is left of IRO is its mathematics: the policy update of equation (6) and
Theorem 1. In numpy and float64, with policies as logarithms. Nothing here samples or fits.

Letters: A tokens, H the longest answer, `*batch` trees of one shape that are worked on together.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float

Policy = tuple[Float[np.ndarray, "*batch states A"], ...]
"""The log-probabilities of the next token at every prefix: entry h is `[*batch, A**h, A]`."""

EOS = 0


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerTree:
    """All answers to a prompt, with the frozen policy's probabilities and the rewards.

    The prefix `y_1..y_h` is state number `sum_i y_i A^(h-i)` of depth h: its successors lie
    side by side. An answer that ends before H goes on with a token of probability 1, so that
    all answers are of length H.

    Attributes:
      log_policy: pi_base.
      rewards: of complete answers. Those of probability 0 have one that is never read.
    """

    log_policy: Policy
    rewards: Float[np.ndarray, "*batch answers"]

    @property
    def horizon(self) -> int:
        """H."""
        return len(self.log_policy)

    @property
    def vocabulary(self) -> int:
        """A."""
        return self.log_policy[0].shape[-1]

    @property
    def log_probs(self) -> Float[np.ndarray, "*batch answers"]:
        """The log-probability of every complete answer under pi_base."""
        total = self.log_policy[0][..., 0, :]
        for step in self.log_policy[1:]:
            total = _flat(total[..., None] + step)
        return total

    @property
    def best_reward(self) -> Float[np.ndarray, "*batch"]:
        """J(pi*): the highest reward of an answer that can be sampled."""
        return np.where(np.isfinite(self.log_probs), self.rewards, -np.inf).max(axis=-1)

    @property
    def log_concentrability(self) -> Float[np.ndarray, "*batch"]:
        """log C_ST of Theorem 1, the largest log-ratio of visits of pi* and of pi_base.

        The optimal policy writes one answer, and of every prefix of it pi* is sure: the ratio
        is one over the prefix' probability, largest for the complete answer. Of several
        answers with the best reward, the likeliest makes the smallest C_ST.
        """
        best = self.rewards == self.best_reward[..., None]
        return -np.where(best, self.log_probs, -np.inf).max(axis=-1)

    def shortfalls(self) -> AnswerTree:
        """The same tree with rewards counted from the best one, which becomes 0.

        Every policy of IRO stays as it was, and J becomes J - J(pi*) without cancellation:
        gaps far below float64's resolution of J keep all their digits.
        """
        return AnswerTree(self.log_policy, self.rewards - self.best_reward[..., None])


def random_trees(
    seed: int, batch: int, vocabulary: int, horizon: int, *, has_eos: bool = False
) -> AnswerTree:
    """Trees of random policies, all of whose probabilities are positive, and random rewards.

    Args:
      seed: of the draws.
      batch: how many trees. Rewards of every other one are uniform in [0, 1]; in the others
        about one answer in five is right, 1, the others wrong, 0, as a verifier says it.
      vocabulary: A.
      horizon: H.
      has_eos: whether token 0 ends an answer.
    """
    rng = np.random.default_rng(seed)
    log_policy = []
    finished = np.zeros(1, bool)
    for depth in range(horizon):
        states = vocabulary**depth
        logits = rng.normal(size=(batch, states, vocabulary))
        # What follows an EOS is an EOS, for sure.
        only_eos = finished[:, None] & (np.arange(vocabulary) != EOS)
        log_policy.append(reweight(np.where(only_eos, -np.inf, 0.0), logits))
        finished = _flat(finished[:, None] | (has_eos & (np.arange(vocabulary) == EOS)))
    tree = AnswerTree(tuple(log_policy), rng.uniform(size=(batch, vocabulary**horizon)))
    reachable = np.where(np.isfinite(tree.log_probs), tree.rewards, np.nan)
    verdicts = tree.rewards > np.nanquantile(reachable, 0.8, axis=-1, keepdims=True)
    graded = np.arange(batch)[:, None] % 2 == 0
    return AnswerTree(tree.log_policy, np.where(graded, tree.rewards, verdicts))


def hard_trees(log_concentrability: float, batch: int = 200) -> AnswerTree:
    """Two answers of one token, in a family whose worst member attains Theorem 1's rate.

    The better answer has reward 1 and probability 1 / C_ST, the other one falls short of it by
    a margin between 1e-4 and 1, each tree by another. For every T there is a margin too small
    for T iterations to tell the answers apart.
    """
    margins = np.geomspace(1e-4, 1.0, batch)
    rewards = np.stack([np.ones_like(margins), 1.0 - margins], axis=-1)
    log_probs = np.array([-log_concentrability, np.log(-np.expm1(-log_concentrability))])
    return AnswerTree((np.tile(log_probs, (batch, 1, 1)),), rewards)


def reweight(
    log_policy: Float[np.ndarray, "*batch states A"], score: Float[np.ndarray, "*batch states A"]
) -> Float[np.ndarray, "*batch states A"]:
    """Equation (6): log of pi(a|s) exp(score(s, a)), normalised in every state.

    With pi_base and `sum_{i<t} V_i / beta_i` this is pi_t; with pi_t and `Q_t / beta_t` it is
    the update of equation (5).
    """
    logits = log_policy + score
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def action_values(
    policy: Policy, rewards: Float[np.ndarray, "*batch answers"]
) -> tuple[list[Float[np.ndarray, "*batch states A"]], Float[np.ndarray, "*batch"]]:
    """Q of a policy at every prefix and token, `[*batch, A**h, A]` for each h; and its J."""
    found = []
    values = rewards
    for log_probs in reversed(policy):
        found.append(values.reshape(*values.shape[:-1], *log_probs.shape[-2:]))
        values = np.einsum("...a,...a->...", np.exp(log_probs), found[-1])
    return found[::-1], values[..., 0]


def expected_rewards(
    tree: AnswerTree, betas: Float[np.ndarray, "T ..."]
) -> Float[np.ndarray, "T+1 ..."]:
    """J(pi_0) .. J(pi_T) of Algorithm 3 with exact values: pi_0 is pi_base.

    Args:
      tree: the policy and the rewards.
      betas: one a value function and tree, or one a value function for all trees.
    """
    scores = [np.zeros_like(step) for step in tree.log_policy]
    found = []
    for beta in np.asarray(betas, np.float64)[..., None, None]:
        policy = tuple(map(reweight, tree.log_policy, scores))
        values, expected = action_values(policy, tree.rewards)
        found.append(expected)
        for score, value in zip(scores, values, strict=True):
            score += value / beta
    policy = tuple(map(reweight, tree.log_policy, scores))
    return np.stack([*found, action_values(policy, tree.rewards)[1]])


def theorem_1_bound(
    log_concentrability: Float[np.ndarray, "*batch"],
    r_max: float,
    horizon: int,
    num_iterations: int,
) -> Float[np.ndarray, "*batch"]:
    """2 sqrt(r_max^2 H^2 log T log C_ST / T): the gap that the best iterate stays under.

    The first term of Theorem 1, which is the whole of it where values are exact.
    """
    rate = math.log(num_iterations) / num_iterations
    return 2 * r_max * horizon * np.sqrt(rate * log_concentrability)


def _flat(array: np.ndarray) -> np.ndarray:
    """`[..., states, A]` as the states of the next depth."""
    return array.reshape(*array.shape[:-2], -1)
