"""Methods side by side: one search of the evaluation prompts for each, and what they answer.

    base                the policy alone; its figures are means over all candidates
    best_of_N           the same candidates, the reward picks
    guided_sample_t     guided by V_0 .. V_{t-1}; the values pick, no reward is asked
    iro_t               the same candidates, the reward picks

and likewise for a compressed value function or any other guidance. Other methods keep their names:

    cards               what the method itself answers
    blockwise_picked    the best of its answers by the reward, where it has several

A second reward that no training saw judges what was picked.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from iro_jax.collect import Collector, Guidance
from iro_jax.data import Prompt, Rollout
from iro_jax.files import write_atomic
from iro_jax.rewards import Reward, TextAnswer, check_rewards
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
    """

    def __init__(self, workdir: Workdir, collector: Collector, judge: Reward | None):
        self.workdir = workdir
        self.collector = collector
        self.judge = judge

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
        if name == UNGUIDED:
            size = self.collector.settings.num_candidates
            base = self._base(candidates)
            self._write(base, by_value)
            results = [base, self._picked(f"best_of_{size}", by_reward)]
        elif guidance.method is not None:
            results = [self._picked(name, by_value)]
            if max(map(len, candidates)) > 1:
                results.append(self._picked(f"{name}_picked", by_reward))
        else:
            suffix = name.removeprefix("iteration_")
            results = [
                self._picked(f"guided_sample_{suffix}", by_value),
                self._picked(f"iro_{suffix}", by_reward),
            ]
        self.workdir.finish(stage, [_to_json(result) for result in results])
        return results

    def _base(self, candidates: Sequence[Sequence[Rollout]]) -> MethodResult:
        """Means over all samples of a prompt: the expectation of one, with less noise."""
        flat = [rollout for of_prompt in candidates for rollout in of_prompt]
        sizes = np.cumsum([len(of_prompt) for of_prompt in candidates])[:-1]

        def means(numbers: np.ndarray) -> np.ndarray:
            return np.asarray([part.mean() for part in np.split(numbers, sizes)])

        judged = self._judge(flat)
        rewards = np.asarray([rollout.reward for rollout in flat])
        return MethodResult("base", means(rewards), None if judged is None else means(judged))

    def _picked(self, method: str, rollouts: Sequence[Rollout]) -> MethodResult:
        rewards = np.asarray([rollout.reward for rollout in rollouts])
        result = MethodResult(method, rewards, self._judge(rollouts))
        self._write(result, rollouts)
        return result

    def _judge(self, rollouts: Sequence[Rollout]) -> np.ndarray | None:
        if self.judge is None:
            return None
        prompts = [rollout.prompt for rollout in rollouts]
        return check_rewards(self.judge(prompts, [_answer(r) for r in rollouts]), prompts)

    def _write(self, result: MethodResult, rollouts: Sequence[Rollout]) -> None:
        """`outputs.jsonl`, whose rows `alpaca_eval` takes as they are, and `metrics.json`.

        Where a method's figures are means over several answers, the rows show one of them.
        """
        method = result.name
        folder = self.workdir / "eval" / method
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "instruction": instruction(rollout.prompt),
                "output": rollout.text,
                "generator": method,
                "prompt_id": rollout.prompt.id,
                "reward": rollout.reward,
                "finished": rollout.finished,
                "num_tokens": len(rollout.tokens),
            }
            for rollout in rollouts
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(folder / "outputs.jsonl", text)
        metrics = {
            "method": method,
            "num_prompts": len(rows),
            "mean_reward": float(np.mean(result.reward)),
            "mean_judge": None if result.judge is None else float(np.mean(result.judge)),
            "mean_length": float(np.mean([len(rollout.tokens) for rollout in rollouts])),
            "finished": float(np.mean([rollout.finished for rollout in rollouts])),
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
