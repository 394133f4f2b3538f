"""What there is besides IRO, and IRO itself, on one search engine.

A method says what guides (`guide`, and with which weight), how a policy's answers are extended, and
which candidates survive. The engine, its caches and its costs are the same for all of them:

    name                       guide       successors        survivors
    best_of_n                  nothing     whole answers     all; a reward picks
    implicit_best_of_n         log-ratio   whole answers     all; the log-ratio picks
    iro                        values      chunks            K of K * B, the distinct ones first
    reward_search              reward      chunks            the same, by the reward of prefixes
    weak_to_strong             log-ratio   chunks            the K best
    blockwise                  values      chunks            the best of each beam
    controlled_decoding        values      top-k tokens      a draw: log pi + lambda V
    value_augmented            values      top-k tokens      the same, beta (V - mean V)
    q_sharp                    values      top-k tokens      the same, log E exp(eta r)
    args                       reward      top-k tokens      the best, or a draw: logit + w r
    cards                      reward      segments          the first above a rising threshold

Token-wise methods score all top-k tokens in one pass that reads one token behind each prefix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

from iro_jax.guidance import AnswerSource, Segments
from iro_jax.models import Sampling
from iro_jax.search import (
    AcceptFirst,
    SelectFn,
    diversity_first,
    per_parent,
    softmax_per_parent,
    top_k,
    with_log_probs,
)
from iro_jax.values import ValueFunction

GuideName = Literal["nothing", "values", "reward", "log_ratio"]


@dataclasses.dataclass(frozen=True)
class Method:
    """How one method uses the search.

    Attributes:
      name: of the method.
      guide: what scores prefixes: nothing, value functions, the reward model itself, or the
        log-ratio of a tuned and an untuned policy.
      beam_width, num_successors, chunk_length: K, B, L; a chunk length of None is the whole answer.
      select_fn: which candidates survive.
      weight: what multiplies the score, 1 / beta.
      eta: value functions give log E exp(eta r); see `iro_jax.values.Head`.
      successors: `sampled` chunks, or the B most probable `top_tokens`.
      segments: where sampled chunks end before L tokens.
      sampling: how tokens are drawn; None leaves that to the run.
      answers: the `finalists`, ranked by their scores, or the `beams`: each chain's own answer,
        where something besides the score has chosen it.
    """

    name: str
    guide: GuideName
    beam_width: int
    num_successors: int
    chunk_length: int | None
    select_fn: SelectFn
    weight: float = 1.0
    eta: float | None = None
    successors: Literal["sampled", "top_tokens"] = "sampled"
    segments: Segments | None = None
    sampling: Sampling | None = None
    answers: AnswerSource = "finalists"

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise ValueError(f"{self.name}: a weight must be positive. Got: {self.weight}")

    def seen_by(self, function: ValueFunction) -> ValueFunction:
        """A value function that gives what the method wants of it.

        Raises:
          ValueError: the method wants a distribution of the reward, and the function has none.
        """
        if self.eta is None:
            return function
        head = function.network.head
        if head is None:
            raise ValueError(f"{self.name} needs a head that gives a distribution. Got: a score")
        network = dataclasses.replace(
            function.network, head=dataclasses.replace(head, eta=self.eta)
        )
        return dataclasses.replace(function, network=network)


def best_of_n(n: int = 16) -> Method:
    """N whole answers; the reward, explicit or implicit, picks one: argmax_i r(x, y_i)."""
    return Method("best_of_n", "nothing", 1, n, None, top_k)


def implicit_best_of_n(n: int = 16) -> Method:
    """N whole answers; log pi_tuned(y|x) - log pi_untuned(y|x), EOS included, picks one (BoN-I)."""
    return Method("implicit_best_of_n", "log_ratio", 1, n, None, top_k)


def iro(beam_width: int = 4, num_successors: int = 4, chunk_length: int = 16) -> Method:
    """Chunk-level beam search by the sum of V_t / beta_t (Algorithm 4 of arXiv 2506.17828)."""
    return Method("iro", "values", beam_width, num_successors, chunk_length, diversity_first)


def reward_search(beam_width: int = 4, num_successors: int = 4, chunk_length: int = 16) -> Method:
    """The same search scored by the reward model, which has been trained on whole answers only."""
    return Method(
        "reward_search", "reward", beam_width, num_successors, chunk_length, diversity_first
    )


def weak_to_strong(beam_width: int = 4, num_successors: int = 4, chunk_length: int = 16) -> Method:
    """Chunk beam search by log pi_tuned(y|x) - log pi_untuned(y|x) (arXiv 2405.19262)."""
    return Method("weak_to_strong", "log_ratio", beam_width, num_successors, chunk_length, top_k)


def blockwise(num_blocks: int = 8, block_length: int = 8, chains: int = 1) -> Method:
    """Block-wise controlled decoding: argmax V of M sampled blocks (arXiv 2310.17022)."""
    return Method("blockwise", "values", chains, num_blocks, block_length, per_parent)


def controlled_decoding(weight: float = 1.0, k: int = 20, chains: int = 1) -> Method:
    """Token-wise controlled decoding (arXiv 2310.17022): pi(v) exp(lambda V(x, y, v)) over top-k.

    `weight` is lambda. V is fitted by FUDGE (equation 7) or by CD-Q; the search is the same.
    """
    return _tokenwise("controlled_decoding", "values", k, chains, softmax_per_parent, weight=weight)


def value_augmented(weight: float = 3.0, k: int = 20, chains: int = 1) -> Method:
    """Value-augmented sampling (arXiv 2405.06639): logits + beta (V - mean of V over top-k).

    `weight` is beta. The mean is the same for all tokens of a state, so that the softmax does not
    see it: this is token-wise controlled decoding with lambda = beta.
    """
    return _tokenwise("value_augmented", "values", k, chains, softmax_per_parent, weight=weight)


def q_sharp(eta: float = 10.0, k: int = 20, chains: int = 1) -> Method:
    """Q# (arXiv 2502.20548): logits + log E exp(eta r), the reward's distribution under pi_base.

    Value functions have sigmoid heads, where the term is log(1 + exp(eta + l)) - log(1 + exp(l)),
    or categorical ones: logsumexp_j(log p_j + eta a_j). Where they know pi_base's distribution of
    rewards, draws are those of the regularised optimum pi_base(y) exp(eta r(y)) / Z.
    """
    return _tokenwise("q_sharp", "values", k, chains, softmax_per_parent, eta=eta)


def args(
    weight: float = 1.5, k: int = 10, temperature: float | None = None, chains: int = 1
) -> Method:
    """ARGS (arXiv 2402.01694): argmax over top-k tokens v of logit(v) + w r(x, y, v).

    With a `temperature` (the authors' is 0.7) it draws from the softmax of the same scores divided
    by it. The logits are those of temperature 1.
    """
    select: SelectFn = per_parent
    if temperature is not None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"args: temperature must be positive or None. Got: {temperature}")
        select = functools.partial(softmax_per_parent, temperature=temperature)
    return _tokenwise("args", "reward", k, chains, select, weight=weight)


def cards(
    goal: float,
    max_new_tokens: int,
    *,
    proposals: int = 20,
    alpha: float = 0.5,
    beta: float = 0.7,
    top_k_tokens: int = 40,
    segments: Segments = Segments(),
    max_segment: int = 64,
) -> Method:
    """Cascade reward sampling (arXiv 2406.16306); see `AcceptFirst` for its formula.

    A segment ends where the next token's entropy reaches 3 after 4 tokens, or at 64. `beta` is the
    temperature of the policy and of the acceptance, as with the authors.

    Args:
      goal: r*, for example a high quantile of the rewards of the policy's own answers.
      max_new_tokens: H, where the threshold reaches the goal.
      proposals: of each segment, after which the best is taken.
    """
    return Method(
        "cards",
        "reward",
        1,
        proposals,
        min(max_segment, max_new_tokens),
        AcceptFirst(goal, max_new_tokens, alpha, beta),
        segments=segments,
        sampling=Sampling(temperature=beta, top_k=top_k_tokens),
        answers="beams",
    )


def _tokenwise(
    name: str,
    guide: GuideName,
    k: int,
    chains: int,
    select_fn: SelectFn,
    *,
    weight: float = 1.0,
    eta: float | None = None,
) -> Method:
    return Method(
        name,
        guide,
        chains,
        k,
        1,
        with_log_probs(select_fn),
        weight=weight,
        eta=eta,
        successors="top_tokens",
        answers="beams",
    )
