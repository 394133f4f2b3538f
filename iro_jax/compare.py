"""Methods side by side: one search of the evaluation prompts for each, and what they answer.

    base                the policy alone; its figures are means over all candidates
    best_of_N           the same candidates, the reward picks
    guided_sample_t     guided by V_0 .. V_{t-1}; the values pick, no reward is asked
    iro_t               the same candidates, the reward picks

and likewise for a compressed value function or any other guidance. Where answers can vote, as those
to questions of mathematics, the reward is 0 or 1, its mean the accuracy, and there are

    majority_of_N       the policy's most frequent answer
    majority_t          the most frequent one of the finalists that the values have left
    weighted_t          the answer whose finalists have the highest sum of values

Other methods keep their names:

    cards               what the method itself answers
    blockwise_picked    the best of its answers by the reward, where it has several

Where the prompts bring answers of their own, these are the method `references`. A second reward
that no training saw judges what was picked.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from iro_jax import hosts
from iro_jax.collect import Collector, Guidance
from iro_jax.data import Prompt, Rollout
from iro_jax.evaluation import best_of_n_divergence, distinct_n, search_divergence
from iro_jax.files import write_atomic
from iro_jax.guidance.answers import Vote
from iro_jax.rewards import Reward, TextAnswer, check_rewards
from iro_jax.search import majority
from iro_jax.workdir import Workdir

UNGUIDED = "unguided"


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """What one method answered to n prompts.

    Attributes:
      name: of the method.
      reward: that training saw, of each prompt's answer, `[n]`.
      judge: the second reward, `[n]`, or None if there is none.
    """

    name: str
    reward: Float[np.ndarray, " n"]
    judge: Float[np.ndarray, " n"] | None


class Comparison:
    """Searches the evaluation prompts and writes down what every method answers.

    Args:
      workdir: of the run; results go to `eval/`.
      collector: searches and rewards.
      judge: the second reward.
      vote: what an answer says, where answers can vote.
    """

    def __init__(
        self,
        workdir: Workdir,
        collector: Collector,
        judge: Reward | None,
        vote: Vote | None = None,
    ):
        self.workdir = workdir
        self.collector = collector
        self.judge = judge
        self.vote = vote

    def __call__(
        self, prompts: Sequence[Prompt], searches: Mapping[str, Guidance]
    ) -> list[MethodResult]:
        """Runs or continues the comparison.

        Args:
          prompts: to evaluate on.
          searches: the guidance of each search, by a name such as `iteration_1`; the unguided
            search is added.
        """
        results: list[MethodResult] = []
        for name, guidance in {UNGUIDED: Guidance(), **searches}.items():
            results += self._search(name, guidance, prompts)
        if self.vote is None and all(isinstance(prompt.reference, str) for prompt in prompts):
            results.append(self._references(prompts))
        return results

    def _search(
        self, name: str, guidance: Guidance, prompts: Sequence[Prompt]
    ) -> list[MethodResult]:
        stage = f"eval/{name}"
        store = self.collector(
            self.workdir / "eval" / "searches" / name,
            prompts,
            guidance,
            stage=stage,
            phase="inference",
        )
        if self.workdir.done(stage):
            return [_result(fields) for fields in self.workdir.result(stage)]
        found: dict[str, list[Rollout]] = {}
        for rollout in store.all():
            found.setdefault(rollout.prompt.id, []).append(rollout)
        candidates = [found[prompt.id] for prompt in prompts]
        by_value = [of_prompt[0] for of_prompt in candidates]
        by_reward = [max(of_prompt, key=lambda r: r.reward) for of_prompt in candidates]
        far = self._divergence(guidance, by_value)
        suffix = name.removeprefix("iteration_")
        if name == UNGUIDED:
            suffix = f"of_{self.collector.settings.num_candidates}"
            results = [
                self._base(candidates, by_value),
                self._picked(f"best_{suffix}", by_reward, far),
            ]
        elif guidance.method is not None:
            results = [self._picked(name, by_value, far)]
            if max(map(len, candidates)) > 1:
                results.append(self._picked(f"{name}_picked", by_reward, far))
        else:
            results = [
                self._picked(f"guided_sample_{suffix}", by_value, far),
                self._picked(f"iro_{suffix}", by_reward, far),
            ]
        if self.vote is not None and guidance.method is None:
            results += self._elected(suffix, candidates, far, weighted=name != UNGUIDED)
        self.workdir.finish(stage, [_to_json(result) for result in results])
        return results

    def _base(
        self, candidates: Sequence[Sequence[Rollout]], shown: Sequence[Rollout]
    ) -> MethodResult:
        """Means over all samples of a prompt: the expectation of one, with less noise."""
        flat = [rollout for of_prompt in candidates for rollout in of_prompt]
        sizes = np.cumsum([len(of_prompt) for of_prompt in candidates])[:-1]

        def means(numbers: np.ndarray) -> np.ndarray:
            return np.asarray([part.mean() for part in np.split(numbers, sizes)])

        answers = [_answer(rollout) for rollout in flat]
        judged = self._judge([rollout.prompt for rollout in flat], answers)
        rewards = np.asarray([rollout.reward for rollout in flat])
        result = MethodResult("base", means(rewards), None if judged is None else means(judged))
        prompts = [rollout.prompt for rollout in shown]
        self._write(
            result,
            prompts,
            [_answer(rollout) for rollout in shown],
            np.asarray([rollout.reward for rollout in shown]),
            divergence=0.0,
        )
        return result

    def _picked(
        self, method: str, rollouts: Sequence[Rollout], divergence: float | None
    ) -> MethodResult:
        prompts = [rollout.prompt for rollout in rollouts]
        answers = [_answer(rollout) for rollout in rollouts]
        rewards = np.asarray([rollout.reward for rollout in rollouts])
        result = MethodResult(method, rewards, self._judge(prompts, answers))
        self._write(result, prompts, answers, rewards, divergence)
        return result

    def _elected(
        self,
        suffix: str,
        candidates: Sequence[Sequence[Rollout]],
        divergence: float | None,
        *,
        weighted: bool,
    ) -> list[MethodResult]:
        """What majorities answer."""
        assert self.vote is not None
        by_count, by_score = [], []
        for of_prompt in candidates:
            votes = [self.vote(rollout.text) for rollout in of_prompt]
            by_count.append(of_prompt[majority(votes)[0]])
            by_score.append(of_prompt[majority(votes, [r.score for r in of_prompt])[0]])
        results = [self._picked(f"majority_{suffix}", by_count, divergence)]
        if weighted:
            results.append(self._picked(f"weighted_{suffix}", by_score, divergence))
        return results

    def _references(self, prompts: Sequence[Prompt]) -> MethodResult:
        """The answers that the prompts bring."""
        stage = "eval/references"
        if self.workdir.done(stage):
            [fields] = self.workdir.result(stage)
            return _result(fields)
        answers = [TextAnswer(str(prompt.reference)) for prompt in prompts]
        rewards = check_rewards(self.collector.reward(prompts, answers), prompts)
        result = MethodResult("references", rewards, self._judge(prompts, answers))
        self._write(result, prompts, answers, rewards, divergence=None)
        self.workdir.finish(stage, [_to_json(result)])
        return result

    def _divergence(self, guidance: Guidance, answers: Sequence[Rollout]) -> float | None:
        """A bound on KL(method || policy) in nats; None where none is known."""
        method, length = self.collector.method(guidance), self.collector.settings.max_new_tokens
        if method.successors == "top_tokens":
            # -log pi of what it answers: all of the divergence if it answers nothing else.
            return -float(np.mean([rollout.log_probs.sum() for rollout in answers]))
        if method.sampling is not None:
            return None  # it draws from another distribution than the run's policy
        candidates = method.beam_width * method.num_successors
        if method.chunk_length is None:
            return best_of_n_divergence(candidates)
        shortest = method.chunk_length if method.segments is None else method.segments.min_tokens
        return search_divergence(candidates, method.num_successors, math.ceil(length / shortest))

    def _judge(self, prompts: Sequence[Prompt], answers: Sequence[TextAnswer]) -> np.ndarray | None:
        if self.judge is None:
            return None
        return check_rewards(self.judge(prompts, answers), prompts)

    def _write(
        self,
        result: MethodResult,
        prompts: Sequence[Prompt],
        answers: Sequence[TextAnswer],
        rewards: np.ndarray,
        divergence: float | None,
    ) -> None:
        """`outputs.jsonl`, whose rows `alpaca_eval` takes as they are, and `metrics.json`.

        Where a method's figures are means over several answers, the rows show one of them.
        """
        if not hosts.first():
            return
        method = result.name
        folder = self.workdir / "eval" / method
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "instruction": instruction(prompt),
                "output": answer.text,
                "generator": method,
                "prompt_id": prompt.id,
                "reward": float(reward),
                "finished": answer.finished,
                "num_tokens": len(answer.tokens),
            }
            for prompt, answer, reward in zip(prompts, answers, rewards, strict=True)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(folder / "outputs.jsonl", text)
        metrics = {
            "method": method,
            "num_prompts": len(rows),
            "mean_reward": float(np.mean(result.reward)),
            "mean_judge": None if result.judge is None else float(np.mean(result.judge)),
            "mean_length": float(np.mean([len(answer.tokens) for answer in answers])),
            "finished": float(np.mean([answer.finished for answer in answers])),
            "distinct_2": distinct_n([answer.text for answer in answers], 2),
            "divergence_bound": divergence,
        }
        write_atomic(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")


def instruction(prompt: Prompt) -> str:
    """A prompt as one text: the raw prompt, or the last message."""
    if isinstance(prompt.conversation, str):
        return prompt.conversation
    return prompt.conversation[-1]["content"]


def _answer(rollout: Rollout) -> TextAnswer:
    return TextAnswer(rollout.text, tuple(map(int, rollout.tokens)), rollout.finished)


def _to_json(result: MethodResult) -> dict[str, object]:
    judge = None if result.judge is None else result.judge.tolist()
    return {"name": result.name, "reward": result.reward.tolist(), "judge": judge}


def _result(fields: Mapping[str, list[float]]) -> MethodResult:
    judge = None if fields["judge"] is None else np.asarray(fields["judge"])
    return MethodResult(str(fields["name"]), np.asarray(fields["reward"]), judge)
