"""Policies trained on their own answers, round by round: GRPO and iREPO."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from iro_jax.baselines.losses import group_advantages, soft_preference
from iro_jax.baselines.pairs import stacked
from iro_jax.baselines.policies import (
    GroupObjective,
    PairObjective,
    Reading,
    Tuned,
    TuningSettings,
    answer_arrays,
    answer_log_probs,
    tune,
)
from iro_jax.data import Prompt, subset
from iro_jax.guidance import Guide, GuidedAnswer
from iro_jax.models import Pretrained, Sampling, TextFormat, bucket_length
from iro_jax.rewards import Reward, check_rewards
from iro_jax.search import top_k
from iro_jax.values import AnswerTokens
from iro_jax.values.fit import Epoch, Example


@dataclasses.dataclass(frozen=True)
class OnlineSettings:
    """Rounds of sampling and training.

    Attributes:
      rounds: how many.
      prompts_per_round: of a fresh subset; one of them is held out.
      answers: sampled for each prompt: the group of GRPO, pairs of iREPO.
      max_new_tokens: longest answer.
      sampling: how tokens are drawn.
      batch_size: prompts sampled at a time.
      seed: of prompts and draws.
    """

    rounds: int = 8
    prompts_per_round: int = 16
    answers: int = 8
    max_new_tokens: int = 64
    sampling: Sampling = Sampling()
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self):
        if self.rounds < 1 or self.prompts_per_round < 2 or self.answers < 2 or self.answers % 2:
            raise ValueError(
                "There must be a round, two prompts in it, and an even number of answers to each."
                f" Got: {self.rounds}, {self.prompts_per_round}, {self.answers}"
            )


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round found: the mean reward of the answers that it trained on, and its losses."""

    mean_reward: float
    curve: tuple[Epoch, ...]


@dataclasses.dataclass(frozen=True)
class TunedOnline:
    """A policy that was trained on its own answers, and what every round found."""

    policy: Pretrained
    rounds: tuple[Round, ...]


class OwnAnswers:
    """Samples answers of a policy whose weights change, with one compiled program."""

    def __init__(self, policy: Pretrained, settings: OnlineSettings, text_format: TextFormat):
        self.settings = settings
        self.guide = Guide(
            policy,
            sampling=settings.sampling,
            beam_width=1,
            num_successors=settings.answers,
            chunk_length=settings.max_new_tokens,
            max_new_tokens=settings.max_new_tokens,
            select_fn=top_k,
            batch_size=settings.batch_size,
            text_format=text_format,
        )

    def __call__(
        self, policy: Pretrained, prompts: Sequence[Prompt], round_number: int
    ) -> list[tuple[GuidedAnswer, ...]]:
        """All answers to each prompt."""
        self.guide.params = dataclasses.replace(self.guide.params, policy=policy.params)
        found = self.guide(
            [prompt.conversation for prompt in prompts],
            seed=self.settings.seed,
            prompt_ids=[f"{prompt.id}@{round_number}" for prompt in prompts],
        )
        return [guided.answers for guided in found]


def tune_grpo(
    policy: Pretrained,
    prompts: Sequence[Prompt],
    reward: Reward,
    tokens: AnswerTokens,
    online: OnlineSettings,
    settings: TuningSettings,
    *,
    clip: float = 0.2,
    beta: float = 0.04,
    folder: Path,
    on_round: Callable[[Round], None] | None = None,
) -> TunedOnline:
    """Group-relative policy optimisation (arXiv 2402.03300).

    Args:
      policy: where it starts, and the reference of the penalty.
      prompts: to answer.
      reward: of the answers.
      tokens: answers as the policy reads them.
      online: rounds of sampling.
      settings: of the fit in each round.
      clip, beta: of the loss.
      folder: of the checkpoints. A killed run samples its rounds again and finds its fits done.
      on_round: is told what each round has found.

    Raises:
      FitError: a loss is not finite, or the disk is full.
    """
    objective = GroupObjective(policy.network, settings.remat, clip, beta)

    def examples(
        current: Pretrained,
        asked: Sequence[Prompt],
        answers: Sequence[Sequence[GuidedAnswer]],
        scores: np.ndarray,
        length: int,
    ) -> list[list[Example]]:
        advantages = group_advantages(scores[0])
        flat = _readings(asked, answers, tokens)
        sampled = answer_log_probs(current, flat, length=length)
        reference = answer_log_probs(policy, flat, length=length)
        rows = [
            answer_arrays(reading, length)
            | {
                "sampled": sampled[i].astype(np.float32),
                "reference": reference[i].astype(np.float32),
                "advantage": np.asarray(advantages.reshape(-1)[i], np.float32),
                "weight": np.ones((), np.float32),
            }
            for i, reading in enumerate(flat)
        ]
        size = online.answers
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    return _rounds(
        policy, prompts, [reward], tokens, online, settings, objective, examples, folder, on_round
    )


def tune_irepo(
    policy: Pretrained,
    prompts: Sequence[Prompt],
    annotators: Sequence[Reward],
    tokens: AnswerTokens,
    online: OnlineSettings,
    settings: TuningSettings,
    *,
    beta: float = 0.1,
    label_clip: float = 0.05,
    folder: Path,
    on_round: Callable[[Round], None] | None = None,
) -> TunedOnline:
    """Iterated regression of log-ratios on soft labels (iREPO, arXiv 2405.15230).

    Every round the present policy samples pairs, the annotators' scores become probabilities, and
    the next policy is fitted to them with the present one as reference. A reconstruction, see
    `irepo_loss`. Its arguments are those of `tune_grpo`, but

    Args:
      annotators: rewards whose votes make the soft labels; one alone gives hard ones.
      label_clip: how near to 0 and 1 labels may come.
    """
    objective = PairObjective(policy.network, settings.remat, "irepo", beta)

    def examples(
        current: Pretrained,
        asked: Sequence[Prompt],
        answers: Sequence[Sequence[GuidedAnswer]],
        scores: np.ndarray,
        length: int,
    ) -> list[list[Example]]:
        flat = _readings(asked, answers, tokens)
        reference = answer_log_probs(current, flat, length=length).sum(axis=1).reshape(-1, 2)
        pairs = scores.reshape(len(annotators), -1, 2)
        labels = soft_preference(pairs[..., 0], pairs[..., 1], clip=label_clip)
        rows = [
            stacked(flat[2 * i : 2 * i + 2], length)
            | {
                "reference": reference[i].astype(np.float32),
                "preference": np.asarray(labels[i], np.float32),
                "weight": np.ones((), np.float32),
            }
            for i in range(len(labels))
        ]
        size = online.answers // 2
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    return _rounds(
        policy, prompts, annotators, tokens, online, settings, objective, examples, folder, on_round
    )


def _rounds(
    policy: Pretrained,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    tokens: AnswerTokens,
    online: OnlineSettings,
    settings: TuningSettings,
    objective: GroupObjective | PairObjective,
    examples: Callable[..., list[list[Example]]],
    folder: Path,
    on_round: Callable[[Round], None] | None,
) -> TunedOnline:
    """Sampling, scoring and fitting; `examples` makes those of every prompt."""
    sampler = OwnAnswers(policy, online, tokens.text_format)
    # One length for all rounds, so that there is one program.
    longest = max(len(sampler.guide.render(prompt.conversation)) for prompt in prompts)
    length = bucket_length(longest + online.max_new_tokens)
    current, found = policy, []
    for number in range(online.rounds):
        asked = subset(prompts, number, online.prompts_per_round, online.seed)
        answers = sampler(current, asked, number)
        flat = [answer for of_prompt in answers for answer in of_prompt]
        of_each = [prompt for prompt, some in zip(asked, answers, strict=True) for _ in some]
        scores = np.stack([check_rewards(reward(of_each, flat), of_each) for reward in rewards])
        scores = scores.reshape(len(rewards), len(asked), online.answers)
        rows = examples(current, asked, answers, scores, length)
        tuned: Tuned = tune(
            current,
            objective,
            [example for of_prompt in rows[1:] for example in of_prompt],
            rows[0],
            dataclasses.replace(settings, seed=settings.seed + number),
            folder=folder / f"round_{number}",
            desc=f"round {number + 1} of {online.rounds}",
        )
        current = tuned.policy
        found.append(Round(float(scores.mean()), tuned.curve))
        if on_round is not None:
            on_round(found[-1])
    return TunedOnline(current, tuple(found))


def _readings(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[GuidedAnswer]], tokens: AnswerTokens
) -> list[Reading]:
    """All answers to the first prompt, then to the next."""
    return [
        tokens(prompt, answer)
        for prompt, some in zip(prompts, answers, strict=True)
        for answer in some
    ]
