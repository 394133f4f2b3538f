"""Win rates by a judge that compares answers: a model behind an endpoint, named in the config.

Every method is compared with best-of-N, and with the prompts' own answers where they bring some.
Each comparison is a stage of the run: what a judge has been paid for is not asked again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.report.tables import WINS_HEADER, best_of, win_rows
from iro_jax.compare import MethodResult
from iro_jax.evaluation import markdown_table
from iro_jax.evaluation.judging import (
    INSTRUCTION,
    TLDR,
    ChatJudge,
    JudgeError,
    PairJudge,
    Template,
)
from iro_jax.files import write_atomic
from iro_jax.workdir import Workdir

TEMPLATES: dict[str, Template] = {"instruction": INSTRUCTION, "tldr": TLDR}


def endpoint_judge(config: ConfigDict) -> PairJudge | None:
    """The judge of `config.eval.endpoint`; None where there is none.

    Raises:
      ValueError: there is no template of that name.
      ImportError: the package `openai` is missing.
    """
    chosen = config.eval.endpoint
    if chosen.template not in TEMPLATES:
        raise ValueError(
            f"eval.endpoint.template must be one of {tuple(TEMPLATES)}. Got: {chosen.template!r}"
        )
    if chosen.model is None:
        if config.eval.rivals:
            logging.warning(
                "Win rates by an endpoint are left out: there is none (eval.endpoint.model)"
            )
        return None
    key = os.environ.get("OPENAI_API_KEY")
    if key is None and chosen.base_url is None:
        logging.warning(
            "Win rates by the endpoint are left out: OPENAI_API_KEY is not set, and there is no"
            " server of your own (eval.endpoint.base_url)"
        )
        return None
    # A server of one's own takes any key.
    key = key or "none"
    template = TEMPLATES[chosen.template]
    return ChatJudge(chosen.model, template, base_url=chosen.base_url, api_key=key)


def judge_pairs(workdir: Workdir, judge: PairJudge | None, results: Sequence[MethodResult]) -> None:
    """Compares the methods' answers, and writes `report/wins.md`.

    A judge that cannot be reached is told in one line; another run of the same command asks again.
    """
    if judge is None:
        return
    names = [result.name for result in results]
    opponents = [best_of(names), *({"references"} & set(names))]
    pairs = [
        (name, opponent)
        for opponent in opponents
        for name in names
        # The base policy's figures are means; its rows show one sample.
        if name not in ("references", opponent)
    ]
    try:
        for name, opponent in pairs:
            _compare(workdir, judge, name, opponent)
    except JudgeError as error:
        logging.warning("Win rates by the endpoint are left out: %s", error)
        return
    rows = win_rows({stage: workdir.result(stage) for stage in workdir.stages})
    write_atomic(workdir / "report" / "wins.md", markdown_table(WINS_HEADER, rows))


def _compare(workdir: Workdir, judge: PairJudge, name: str, opponent: str) -> None:
    stage = f"wins/{opponent}/{name}"
    if workdir.done(stage):
        return
    ours, theirs = (_answers(workdir, method) for method in (name, opponent))
    verdicts = judge(
        [row["instruction"] for row in ours],
        [row["output"] for row in ours],
        [row["output"] for row in theirs],
    )
    workdir.finish(
        stage,
        {
            "preference": verdicts.preference.tolist(),
            "shown_first": verdicts.shown_first,
            "changed": verdicts.changed,
            "unread": verdicts.unread,
            "lengths": [len(row["output"]) for row in ours],
            "opponents_lengths": [len(row["output"]) for row in theirs],
        },
    )


def _answers(workdir: Workdir, method: str) -> list[dict[str, Any]]:
    path = workdir / "eval" / method / "outputs.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
