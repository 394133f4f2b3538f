"""The paper's tasks from prompts to table, with a tiny model and tiny files."""

import json

import numpy as np
import pytest

from configs import math, tldr, ultrafeedback
from experiments.run import run
from iro_jax.data import RolloutStore
from iro_jax.evaluation import Ledger
from tests.experiments import tiny

pytestmark = pytest.mark.slow

NUMBERS = ["0", "1", "2", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A policy whose words are w0 to w39 and four numbers."""
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    tiny.write_model(folder, tiny.WORDS + NUMBERS)
    return str(folder)


def shrink(config, model):
    """The variant's own settings, but for sizes."""
    config.policy.name = model
    config.mesh.data = 1
    config.search.update(max_new_tokens=6, chunk_length=2, batch_size=4, shard_size=4)
    config.search.update(beam_width=2, num_successors=2)
    config.search.sampling.update(temperature=1.0, top_k=20, top_p=1.0)
    config.search.text_format.update(max_length=64, truncation="left")
    config.loop.update(prompts_per_iteration=8, held_out=0.25)
    config.value.layer = 1
    for fit in (config.value.fit, config.value.compression):
        fit.update(batch_size=8, num_epochs=2)
    return config


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(i):
    return f"{tiny.WORDS[i % 40]} {tiny.WORDS[(7 * i) % 40]} {tiny.WORDS[(i // 40) % 40]} w1"


def test_summaries(model, tmp_path):
    rows = [
        {
            "prompt": words(i),
            "reference": "w2 w4 w6",
            "ppo_1_3b": "w1 w3",
            "preferred": ("reference", "ours", None)[i % 3],
        }
        for i in range(60)
    ]
    config = shrink(tldr.get_config("smollm2"), model)
    config.task.path = write(tmp_path / "posts.jsonl", rows)
    config.task.train.limit = 40
    config.task.evaluation.update(skip=50, limit=5)
    [results] = run(config, tmp_path / "run", progress=False)
    names = [result.name for result in results]
    assert names[:2] == ["base", "best_of_4"]
    assert {"guided_sample_2", "iro_2", "guided_sample_compressed", "references"} <= set(names)
    facts = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]["reward"]
    # Those without a preference say nothing.
    assert facts["pairs"] + facts["held_out"] == 40
    trained = RolloutStore.open(tmp_path / "run/iter_0/rollouts").all()
    assert all(isinstance(rollout.prompt.conversation, str) for rollout in trained)
    page = (tmp_path / "run/report/index.html").read_text()
    assert f"of {facts['held_out']} held-out pairs right" in page
    # What the reward stage took is in the ledger, and it is not done again.
    before = Ledger(tmp_path / "run/cost.jsonl").totals(stage="reward").seconds
    [again] = run(config, tmp_path / "run", progress=False)
    assert Ledger(tmp_path / "run/cost.jsonl").totals(stage="reward").seconds == before > 0
    np.testing.assert_array_equal(again[-1].reward, results[-1].reward)


@pytest.mark.parametrize("trained_before", [False, True])
def test_instructions(model, tmp_path, trained_before):
    """With a head that the run trains, and with a reward model that is there already."""
    rows = [
        {"prompt": words(i), "chosen": f"w2 w{4 + 2 * (i % 3)}", "rejected": "w1 w3 w5"}
        for i in range(40)
    ]
    prompts = [{"instruction": f"w9 {words(i)}", "reference": "w2"} for i in range(4)]
    config = shrink(ultrafeedback.get_config("smollm2"), model)
    config.task.path = write(tmp_path / "pairs.jsonl", rows)
    config.task.evaluation.path = write(tmp_path / "prompts.jsonl", prompts)
    config.task.train.skip = 10
    if trained_before:
        tiny.write_reward_model(tmp_path / "reward", tiny.WORDS[::-1])
        config.task.reward.path = str(tmp_path / "reward")
        config.value.update(trainable="all", normalise=False, layer=None)
        config.value.head = None
    [results] = run(config, tmp_path / "run", progress=False)
    assert "references" in [result.name for result in results]
    trained = RolloutStore.open(tmp_path / "run/iter_0/rollouts").all()
    assert {m["role"] for rollout in trained for m in rollout.prompt.conversation} == {"user"}
    assert (tmp_path / "run/reward").exists() != trained_before


def test_problems(model, tmp_path):
    rows = [
        {"question": words(i), "answer": f"w1 1 so w{i % 40} 3\n#### {i % 4}"} for i in range(60)
    ]
    other = [{"prompt": f"w8 {words(i)}", "answer": str(i % 4)} for i in range(4)]
    config = shrink(math.get_config("smollm2"), model)
    config.task.path = write(tmp_path / "train.jsonl", rows)
    config.task.evaluation.math500.path = write(tmp_path / "math500.jsonl", other)
    config.task.train.limit = 40
    config.task.evaluation.gsm8k.update(skip=40, limit=6)
    config.loop.prompts_per_iteration = 30
    [results] = run(config, tmp_path / "run", progress=False)
    assert {"majority_of_4", "majority_2", "weighted_2"} <= {result.name for result in results}
    # Worked solutions are references: the answer is what follows the marks.
    for rollout in RolloutStore.open(tmp_path / "run/iter_0/rollouts").all():
        wanted = rollout.prompt.reference.rpartition("#### ")[2]
        last = [word for word in rollout.text.split() if word in NUMBERS][-1:]
        assert rollout.reward == float(last == [wanted])
    stages = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]
    fitted = stages["iter_0/value"]
    # Problems of which all or none were right are left out.
    assert 0 < fitted["train"] + fitted["held_out"] < 30 * 4
    ids = [r.prompt.id for r in RolloutStore.open(tmp_path / "run/eval/searches/unguided").all()]
    assert [sum(id.startswith(name) for id in ids) for name in ("gsm8k/", "math500/")] == [24, 16]
    lines = (tmp_path / "run/report/sets.md").read_text().splitlines()
    assert lines[0].replace(" ", "") == "|method|gsm8k|math500|"
    base = results[0].reward
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    means = [float(cell.split()[0]) for cell in cells[1:]]
    assert cells[0] == "base"
    np.testing.assert_allclose(means, [base[:6].mean(), base[6:].mean()], atol=0.005)
