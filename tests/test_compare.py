"""What a comparison makes of searches: majorities, references, distances from the policy."""

import dataclasses
import json
import math

import numpy as np
import pytest

from iro_jax.collect import Guidance, SearchSettings
from iro_jax.compare import Comparison
from iro_jax.data import Prompt, Rollout
from iro_jax.methods import args, blockwise, cards, iro
from iro_jax.rewards import CallableReward
from iro_jax.search import top_k
from iro_jax.values import ValueFunction
from iro_jax.workdir import Workdir

GUIDED = Guidance(method=iro(2, 2, 4))
ANSWERS = {
    "p0": [("7", 0.9), ("5", 0.3), ("5", 0.4), ("none", 9.0)],
    "p1": [("1", 0.1), ("2", 0.1), ("2", 0.1), ("1", 0.1)],
}


class Store(list):
    """Rollouts that are already there."""

    def all(self):
        return self


@dataclasses.dataclass
class Searches:
    """Stands for a collector: every search finds the same answers."""

    prompts: list[Prompt]
    reward: CallableReward

    settings = SearchSettings(max_new_tokens=12, beam_width=2, num_successors=2, select_fn=top_k)

    def __call__(self, folder, prompts, guidance, *, stage, phase):
        return Store(
            Rollout(
                prompt=prompt,
                prompt_tokens=np.array([1]),
                tokens=np.array([2, 3]),
                text=text,
                finished=True,
                reward=float(text == prompt.reference),
                log_probs=np.array([-1.0, -0.5]),
                iteration=0,
                candidate=index,
                selected=False,
                score=score,
            )
            for prompt in prompts
            for index, (text, score) in enumerate(ANSWERS[prompt.id])
        )

    def method(self, guidance):
        return guidance.method or iro(1, 4, None)


def compare(folder, references, vote, **searches):
    prompts = [Prompt(f"p{i}", "q", reference=r) for i, r in enumerate(references)]
    reward = CallableReward(lambda conversation, text: float(len(text)))
    comparison = Comparison(Workdir(folder, {}), Searches(prompts, reward), None, vote)
    found = {result.name: result.reward.tolist() for result in comparison(prompts, searches)}
    assert found == {r.name: r.reward.tolist() for r in comparison(prompts, searches)}, "once more"
    return found


def number(text):
    return text if text.isdigit() else None


def test_votes_are_counted_or_weighed_and_ties_go_to_the_first_seen(tmp_path, monkeypatch):
    # The values' own search keeps its name where the guidance names no method.
    value = object.__new__(ValueFunction)
    found = compare(tmp_path, ["5", "1"], number, iteration_1=Guidance((value,), (1.0,)))
    assert found["base"] == [0.5, 0.5]
    assert found["best_of_4"] == [1, 1]
    assert found["majority_of_4"] == [1, 1]
    assert "weighted_of_4" not in found
    assert found["guided_sample_1"] == [0, 1]
    assert found["majority_1"] == [1, 1]
    # .9 for 7 against .7 for 5; what says nothing has no weight, however high its score.
    assert found["weighted_1"] == [0, 1]
    assert "references" not in found


def test_references_are_a_method_where_prompts_bring_texts(tmp_path):
    found = compare(tmp_path, ["a text", "another one"], None)
    assert found["references"] == [6, 11]
    assert "majority_of_4" not in found
    rows = (tmp_path / "eval" / "references" / "outputs.jsonl").read_text().splitlines()
    assert [json.loads(row)["output"] for row in rows] == ["a text", "another one"]
    assert "references" not in compare(tmp_path / "labels", [1, 0], None)


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        (None, math.log(4) - 3 / 4),
        (iro(2, 2, 4), math.log(4) + 2 * math.log(2)),
        (iro(2, 2, 5), math.log(4) + 2 * math.log(2)),
        (blockwise(8, 6), 2 * math.log(8)),
        # Its proposals are drawn from another distribution.
        (cards(1.0, 12, proposals=4), None),
        # Nothing is drawn: as far as the answer is improbable.
        (args(k=4), 1.5),
    ],
)
def test_distance_from_the_policy(tmp_path, method, bound):
    searches = {} if method is None else {"method": Guidance(method=method)}
    compare(tmp_path, [1, 0], None, **searches)
    folder = tmp_path / "eval" / ("best_of_4" if method is None else "method")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["divergence_bound"] == (bound and pytest.approx(bound))
