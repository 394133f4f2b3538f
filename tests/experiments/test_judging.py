"""Win rates in a run: who is compared with whom, what is asked once, and what is left out."""

import json
import logging

import numpy as np
import pytest

from configs.base import get_base
from experiments.judging import endpoint_judge, judge_pairs
from experiments.report.tables import win_rows
from iro_jax.compare import MethodResult
from iro_jax.evaluation import CallableJudge, JudgeError
from iro_jax.workdir import Workdir

TEXTS = {"base": "aa", "best_of_4": "bbb", "iro_1": "cccc", "references": "dd d"}
RESULTS = [MethodResult(name, np.zeros(3), None) for name in TEXTS]


@pytest.fixture
def workdir(tmp_path):
    made = Workdir(tmp_path / "run", {})
    (made / "report").mkdir()
    for name, text in TEXTS.items():
        folder = made / "eval" / name
        folder.mkdir(parents=True)
        rows = [{"instruction": f"p{i}", "output": text + "x" * i} for i in range(3)]
        (folder / "outputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_each_method_against_best_of_n_and_references_and_each_pair_once(workdir):
    asked = []

    def longer(prompt, a, b):
        asked.append(prompt)
        return float(len(a) > len(b)) + 0.5 * (len(a) == len(b))

    judge_pairs(workdir, CallableJudge(longer), RESULTS)
    # Four comparisons with best-of-4 or references, three prompts, two orders.
    assert len(asked) == 5 * 3 * 2
    judge_pairs(workdir, CallableJudge(longer), RESULTS)
    assert len(asked) == 5 * 3 * 2
    rows = win_rows({stage: workdir.result(stage) for stage in workdir.stages})
    found = {(name, against): wins.split()[0] for name, against, wins, *_ in rows}
    assert found == {
        ("base", "best_of_4"): "0.000",
        ("iro_1", "best_of_4"): "1.000",
        ("base", "references"): "0.000",
        ("best_of_4", "references"): "0.000",
        ("iro_1", "references"): "0.500",
    }
    assert "| iro_1 | best_of_4 |" in (workdir / "report" / "wins.md").read_text()


def test_a_judge_that_fails_is_told_in_one_line(workdir, caplog):
    def refuse(prompts, first, second):
        raise JudgeError("http://localhost: refused")

    with caplog.at_level(logging.WARNING):
        judge_pairs(workdir, refuse, RESULTS)
    assert [record.getMessage() for record in caplog.records] == [
        "Win rates by the endpoint are left out: http://localhost: refused"
    ]
    assert not (workdir / "report" / "wins.md").exists()


def test_no_endpoint_is_told_where_all_methods_were_asked_for(caplog):
    config = get_base()
    with caplog.at_level(logging.WARNING):
        assert endpoint_judge(config) is None
        assert not caplog.records
        config.eval.rivals = ("cards",)
        assert endpoint_judge(config) is None
        judge_pairs(None, None, RESULTS)
    assert [record.getMessage() for record in caplog.records] == [
        "Win rates by an endpoint are left out: there is none (eval.endpoint.model)"
    ]
    config.eval.endpoint.template = "alpaca"
    with pytest.raises(ValueError, match=r"'instruction', 'tldr'\). Got: 'alpaca'"):
        endpoint_judge(config)
    pytest.importorskip("openai")
    config.eval.endpoint.update(template="tldr", model="m", base_url="http://localhost:1/v1")
    assert endpoint_judge(config).model == "m"
