"""What a run says at its end: the table of methods, the contrasts that matter, the plots."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iro_jax.compare import MethodResult
from iro_jax.evaluation import (
    Cost,
    Drift,
    Health,
    Interval,
    Ledger,
    RewardGap,
    bootstrap,
    closes,
    gap_closed,
    markdown_table,
    paired,
    reward_gap,
    save_health_plots,
)
from iro_jax.evaluation.length_control import JudgedAnswer, fit_length_model
from iro_jax.files import write_atomic
from iro_jax.workdir import Workdir

WINS_HEADER = (
    "method",
    "against",
    "wins (95%)",
    "length-controlled",
    "shown first",
    "changed",
    "unread replies",
)


def write_report(workdir: Workdir, ledger: Ledger, results: Sequence[MethodResult]) -> None:
    """The report of one seed: `report/`."""
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    healths, drifts, losses = read_health(
        {stage: workdir.result(stage) for stage in workdir.stages}
    )
    gap = over_iterations(results)
    write_atomic(folder / "methods.md", methods_table([results]))
    write_atomic(folder / "cost.md", cost_table(ledger))
    write_atomic(folder / "health.md", health_table(healths, drifts, gap))
    try:
        save_health_plots(folder, healths, drifts=drifts, gap=gap, losses=losses)
    except ImportError as error:
        logging.warning("The report has no pictures: %s", error)


def write_sets(
    workdir: Workdir,
    ids: Sequence[str],
    sets: Mapping[str, Sequence[str]],
    results: Sequence[MethodResult],
) -> None:
    """`report/sets.md`: the mean reward in each set of evaluation prompts, if there are several.

    Args:
      ids: of the evaluation prompts, in the order of the results.
      sets: ids by the name of their set.
    """
    if not sets:
        return
    places = {id: index for index, id in enumerate(ids)}
    of_set = {name: [places[id] for id in some] for name, some in sets.items()}
    rows = [
        (result.name, *(str(bootstrap(result.reward[index])) for index in of_set.values()))
        for result in results
    ]
    write_atomic(workdir / "report" / "sets.md", markdown_table(("method", *of_set), rows))


def read_health(
    stages: Mapping[str, Any],
) -> tuple[dict[str, Health], dict[str, Drift], dict[str, tuple[list[float], list[float]]]]:
    """Health, drift and held-out losses of every value function, as the run entered them."""
    healths, drifts, losses = {}, {}, {}
    for stage, found in stages.items():
        # The losses of rivals are of other kinds.
        if not isinstance(found, dict) or "curve" not in found or stage.startswith("rivals/"):
            continue
        label = stage.removesuffix("/value")
        curve = found["curve"]
        losses[label] = (
            [line["epoch"] for line in curve],
            [line["held_out_loss"] for line in curve],
        )
        if "health" in found:
            healths[label] = Health.from_json(found["health"])
        if "drift_of_previous" in found:
            drifts[f"before {label}"] = Drift(**found["drift_of_previous"])
    return healths, drifts, losses


def over_iterations(results: Sequence[MethodResult]) -> RewardGap | None:
    """What the training reward gained over iterations against what the judge's did."""
    of_each = {result.name: result for result in results}
    names = ["base", *(f"guided_sample_{t}" for t in range(1, len(of_each)))]
    chosen = [of_each[name] for name in names if name in of_each]
    judged = [result.judge for result in chosen if result.judge is not None]
    if len(judged) < len(chosen):
        return None
    return reward_gap([result.reward for result in chosen], judged)


def health_table(
    healths: Mapping[str, Health], drifts: Mapping[str, Drift], gap: RewardGap | None
) -> str:
    """Held-out error, calibration and correlation of every value function, in numbers."""
    rows = []
    for label, health in healths.items():
        for place, fit in (
            ("all prefixes", health.overall),
            ("bare prompt", health.prompt),
            *((f"chunk {i}", fit) for i, fit in enumerate(health.boundaries) if i),
            ("whole answer", health.answer),
        ):
            if not fit.count:
                continue
            numbers = (fit.bias, fit.mean_squared_error, fit.r_squared, fit.pearson)
            rows.append((label, place, fit.count, *map(_number, (*numbers, fit.within_prompt))))
    header = ("value", "at", "n", "bias", "mse", "R2", "correlation", "within prompts")
    parts = [markdown_table(header, rows)]
    if drifts:
        parts.append(
            markdown_table(
                ("drift of the value function", "mse", "bias", "R2"),
                [
                    (label, *map(_number, (d.mean_squared_error, d.bias, d.r_squared)))
                    for label, d in drifts.items()
                ],
            )
        )
    if gap is not None:
        lines = [
            (str(t), str(gap.training[t]), str(gap.second[t]), str(gap.gap[t] or ""))
            for t in range(len(gap.training))
        ]
        columns = ("iteration", "training reward", "judge", "gap of gains (deviations)")
        parts.append(markdown_table(columns, lines))
    return "\n".join(parts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def write_table(folder: Path, seeds: Sequence[Sequence[MethodResult]]) -> str:
    """The table over all seeds, `table.md` and `table.json`; returns the text."""
    contrasts = compare(seeds)
    rows = [(name, str(interval), verdict(interval)) for name, interval in contrasts.items()]
    text = methods_table(seeds) + "\n" + markdown_table(("difference", "mean (95%)", ""), rows)
    write_atomic(folder / "table.md", text)
    numbers = {name: vars(interval) for name, interval in contrasts.items()}
    write_atomic(folder / "table.json", json.dumps(numbers, indent=1) + "\n")
    return text


def methods_table(seeds: Sequence[Sequence[MethodResult]]) -> str:
    """Means of every method, with bootstrap intervals over prompts."""
    reward, judge = _by_method(seeds)
    rows = []
    base, best = reward["base"], reward[best_of(reward)]
    for name in reward:
        share = gap_closed(base, reward[name], best)
        rows.append(
            (
                name,
                str(bootstrap(reward[name])),
                "" if share is None else format(share, ".2f"),
                str(bootstrap(judge[name])) if name in judge else "",
            )
        )
    return markdown_table(("method", "reward", "gap closed", "judge"), rows)


def compare(seeds: Sequence[Sequence[MethodResult]]) -> dict[str, Interval]:
    """The contrasts that a run is about: paired differences over prompts."""
    reward, judge = _by_method(seeds)
    of_n = best_of(reward)
    iterations = sorted(
        int(n.removeprefix("iro_")) for n in reward if n[4:].isdigit() and n[:4] == "iro_"
    )
    found: dict[str, Interval] = {}
    for t in iterations:
        sample, picked = f"guided_sample_{t}", f"iro_{t}"
        found[f"{sample} beyond 60% of the gap"] = closes(
            reward["base"], reward[sample], reward[of_n], 0.6
        )
        found[f"{picked} - {of_n}"] = paired(reward[picked], reward[of_n])
        if judge:
            found[f"{picked} - {of_n}, judge"] = paired(judge[picked], judge[of_n])
        if t > 1:
            for kind in ("guided_sample", "iro"):
                name = f"{kind}_{t} - {kind}_1"
                found[name] = paired(reward[f"{kind}_{t}"], reward[f"{kind}_1"])
                if judge:
                    found[f"{name}, judge"] = paired(judge[f"{kind}_{t}"], judge[f"{kind}_1"])
    for kind in ("guided_sample", "iro"):
        if f"{kind}_compressed" in reward:
            best = max((f"{kind}_{t}" for t in iterations), key=lambda name: reward[name].mean())
            found[f"{kind}_compressed - 95% of {best}"] = paired(
                reward[f"{kind}_compressed"], 0.95 * reward[best]
            )
    last = iterations[-1]
    for other in ("compressed", "reward_on_prefixes"):
        for kind in ("guided_sample", "iro"):
            if f"{kind}_{other}" in reward:
                name = f"{kind}_{last} - {kind}_{other}"
                found[name] = paired(reward[f"{kind}_{last}"], reward[f"{kind}_{other}"])
                if judge:
                    found[f"{name}, judge"] = paired(
                        judge[f"{kind}_{last}"], judge[f"{kind}_{other}"]
                    )
    for other in _rivals(reward):
        # What the reward picks is compared with what it picks, and a sample with a sample.
        kind = "iro" if other.endswith("_picked") else "guided_sample"
        found[f"{kind}_{last} - {other}"] = paired(reward[f"{kind}_{last}"], reward[other])
        if judge:
            found[f"{kind}_{last} - {other}, judge"] = paired(judge[f"{kind}_{last}"], judge[other])
    return found


def _rivals(methods: Iterable[str]) -> list[str]:
    """Methods besides IRO, the base policy, its best-of-N, and references."""
    own = ("base", "best_of_", "guided_sample_", "iro_", "majority_", "weighted_", "references")
    return [name for name in methods if not name.startswith(own)]


def cost_table(ledger: Ledger) -> str:
    """Training and inference apart, stage by stage."""
    stages = dict.fromkeys((entry.phase, entry.stage) for entry in ledger.entries())
    totals = [(phase, "all", ledger.totals(phase=phase)) for phase in ("training", "inference")]
    rows = [(phase, stage, ledger.totals(stage=stage)) for phase, stage in stages]
    header = (
        "phase",
        "stage",
        "tokens",
        "value queries",
        "reward queries",
        "TFLOP",
        "seconds",
        "compile",
    )
    return markdown_table(header, [_cost_row(*row) for row in (*rows, *totals)])


def _cost_row(phase: str, stage: str, cost: Cost) -> tuple[str, ...]:
    flops = cost.policy_flops + cost.value_flops + cost.reward_flops
    return (
        phase,
        stage,
        f"{cost.tokens_sampled}",
        f"{cost.value_queries}",
        f"{cost.reward_queries}",
        f"{flops / 1e12:.2f}",
        f"{cost.seconds:.1f}",
        f"{cost.compile_seconds:.1f}",
    )


def win_rows(stages: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Under `WINS_HEADER`: what a judge of pairs has said, from the run's stages."""
    rows = []
    for stage, said in stages.items():
        kind, _, pair = stage.partition("/")
        if kind != "wins":
            continue
        opponent, _, name = pair.partition("/")
        fields = zip(said["preference"], said["lengths"], said["opponents_lengths"], strict=True)
        answers = [JudgedAnswer(str(i), *row) for i, row in enumerate(fields)]
        # How hard each of these instructions is, nobody knows.
        level = {answer.instruction: 0.0 for answer in answers}
        controlled = fit_length_model(answers, level).win_rate(np.zeros(len(answers))) / 100
        shares = (controlled, said["shown_first"], said["changed"])
        wins = str(bootstrap(np.asarray(said["preference"])))
        cells = (*(f"{share:.2f}" for share in shares), str(said["unread"]))
        rows.append((name, opponent, wins, *cells))
    return rows


def rewards_by_method(seeds: Sequence[Sequence[MethodResult]]) -> dict[str, np.ndarray]:
    """Rewards of every method, `[seeds, n]`."""
    return _by_method(seeds)[0]


def judgements_by_method(seeds: Sequence[Sequence[MethodResult]]) -> dict[str, np.ndarray]:
    """The second reward's numbers of every method that has some, `[seeds, n]`."""
    return _by_method(seeds)[1]


def _by_method(
    seeds: Sequence[Sequence[MethodResult]],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Rewards and judgements of every method, `[seeds, n]`."""
    of_all: list[Mapping[str, MethodResult]] = [{r.name: r for r in results} for results in seeds]
    # What a method needs may be there for one seed only.
    names = [r.name for r in seeds[0] if all(r.name in of_seed for of_seed in of_all)]
    reward = {name: np.stack([of_seed[name].reward for of_seed in of_all]) for name in names}
    judge = {}
    for name in names:
        judged = [of_seed[name].judge for of_seed in of_all]
        present = [x for x in judged if x is not None]
        if present:
            judge[name] = np.stack(present)
    return reward, judge


def best_of(methods: Iterable[str]) -> str:
    """The name of best-of-N among methods."""
    return next(name for name in methods if name.startswith("best_of_"))


def verdict(interval: Interval) -> str:
    """What a contrast's interval says."""
    if not interval.excludes_zero:
        return "not told apart"
    return "above" if interval.low > 0 else "below"
