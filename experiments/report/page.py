"""One HTML page about a run, which needs no network: `python -m experiments.report`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from experiments.report import figures
from experiments.report.read import Run, common_methods, read_runs
from experiments.report.tables import (
    compare,
    over_iterations,
    read_health,
    verdict,
    win_rows,
)
from iro_jax.compare import UNGUIDED
from iro_jax.evaluation import (
    Cost,
    Interval,
    bootstrap,
    wins,
)
from iro_jax.evaluation import plots as health_plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_PROMPTS = 12
"""Whose answers are shown side by side."""


@dataclasses.dataclass(frozen=True)
class Spending:
    """What one answer of a method costs, the mean over seeds.

    Attributes:
      tokens, value_queries, reward_queries: for one answer.
      flops: of all networks.
      training_flops, training_seconds: once, of the value functions that the method uses.
      seconds: of the search and its rewards, compilation apart.
      peak_memory_bytes: the highest of the process until then.
    """

    tokens: float
    value_queries: float
    reward_queries: float
    flops: float
    training_flops: float
    training_seconds: float
    seconds: float
    peak_memory_bytes: float


def spending(runs: Sequence[Run], method: str) -> Spending:
    """What a method's answers have cost."""
    found = [_of_run(run, method) for run in runs]
    fields = (field.name for field in dataclasses.fields(Spending))
    return Spending(
        **{name: float(np.mean([getattr(one, name) for one in found])) for name in fields}
    )


def _of_run(run: Run, method: str) -> Spending:
    search = run.search_of[method]
    cost = run.cost(search)
    # The mean over all samples stands for one of them, and asks no reward.
    share = run.num_candidates if method == "base" else 1
    asked = _asks_reward(method)
    flops = cost.policy_flops + cost.value_flops + (cost.reward_flops if asked else 0.0)
    number = run.num_prompts * share
    training = _training(run, search)
    return Spending(
        tokens=cost.tokens_sampled / number,
        value_queries=cost.value_queries / number,
        reward_queries=cost.reward_queries / number if asked else 0.0,
        flops=flops / number,
        training_flops=_flops(training),
        training_seconds=training.seconds - training.compile_seconds,
        seconds=(cost.seconds - cost.compile_seconds) / number,
        peak_memory_bytes=cost.peak_memory_bytes,
    )


def _asks_reward(method: str) -> bool:
    """Whether the reward picks a method's answers."""
    return method.startswith(("best_of_", "iro_")) or method.endswith("_picked")


def _training(run: Run, search: str) -> Cost:
    """Of what guides a search."""
    total = len([stage for stage in run.stages if stage.endswith("/rollouts")])
    if search.startswith("iteration_"):
        return run.training_cost(int(search.removeprefix("iteration_")))
    if search == "compressed":
        return run.training_cost(total, compressed=True)
    rollouts = run.ledger.totals(stage="iter_0/rollouts")
    if search == "q_sharp":
        return rollouts + run.ledger.totals(stage="rivals/categorical")
    if search in ("blockwise_cdq", "controlled_decoding_cdq"):
        return rollouts + run.ledger.totals(stage="rivals/cdq")
    if search in ("blockwise", "controlled_decoding", "value_augmented"):
        return run.training_cost(1)
    # CARDS takes its goal from the rewards of the policy's own answers.
    return rollouts if search == "cards" else Cost()


def _flops(cost: Cost) -> float:
    return cost.policy_flops + cost.value_flops + cost.reward_flops


def write_page(folder: Path, *, answers: int = 1000, target: Path | None = None) -> Path:
    """Writes the page of a finished run, and its picture of all methods, `methods.png`, beside it.

    Args:
      folder: of the run, with one seed or several in it.
      answers: over how many answers training is spread where costs are compared.
      target: the file; by default `report/index.html` in the folder.

    Raises:
      WorkdirError: there is no run, or one that has not been evaluated yet.
      ImportError: matplotlib is not installed.
    """
    if answers < 1:
        raise ValueError(f"answers must be at least 1. Got: {answers}")
    runs = read_runs(folder)
    target = target or folder / "report" / "index.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    content = _content(runs, answers)
    picture = _methods_picture(runs, content["best_of"])
    picture.savefig(target.with_name("methods.png"), dpi=150)
    content["pictures"].insert(
        0,
        (
            "Methods",
            f"95% intervals over prompts; the line is {content['best_of']}.",
            figures.data_uri(picture),
        ),
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(content)
    target.write_text(text, encoding="utf-8")
    return target


def _methods_picture(runs: Sequence[Run], best_of: str) -> Figure:
    """Reward and judge of every method."""
    panels = {}
    for kind in ("reward", "judge"):
        numbers = {name: _stacked(runs, name, kind) for name in common_methods(runs)}
        panels[kind] = {name: bootstrap(x) for name, x in numbers.items() if x is not None}
    return figures.methods({kind: found for kind, found in panels.items() if found}, best_of)


def _content(runs: Sequence[Run], answers: int) -> dict[str, Any]:
    first = runs[0]
    names = common_methods(runs)
    rewards = {name: _stacked(runs, name, "reward") for name in names}
    judged = {name: _stacked(runs, name, "judge") for name in names}
    spent = {name: spending(runs, name) for name in names}
    best_of = f"best_of_{first.num_candidates}"
    curve = _best_of_means(runs)
    return {
        "name": first.config["name"],
        "task": first.config["task"]["name"],
        "policy": first.config["policy"]["name"],
        "seeds": len(runs),
        "prompts": first.num_prompts,
        "candidates": first.num_candidates,
        "answers": answers,
        "methods": [
            _method_row(first, name, rewards, judged, spent[name], best_of) for name in names
        ],
        "reward_model": first.stages.get("reward") or {},
        "endpoint": first.config["eval"].get("endpoint", {}).get("model"),
        "wins": win_rows(first.stages),
        "contrasts": [
            (name, str(interval), verdict(interval))
            for name, interval in compare([run.results for run in runs]).items()
        ],
        "costs": [_cost_row(name, spent[name], answers) for name in names],
        "pay_off": _pay_off(curve, rewards, spent, best_of),
        "best_of": best_of,
        "pictures": _pictures(runs, curve, rewards, spent, answers, best_of),
        "side_by_side": _side_by_side(first, names),
        "trees": _trees(first),
    }


def _stacked(runs: Sequence[Run], name: str, kind: str) -> np.ndarray | None:
    columns = []
    for run in runs:
        [column] = [getattr(r, kind) for r in run.results if r.name == name]
        if column is None:
            return None
        columns.append(column)
    return np.stack(columns)


def _method_row(
    run: Run,
    name: str,
    rewards: dict[str, Any],
    judged: dict[str, Any],
    spent: Spending,
    best_of: str,
) -> dict[str, Any]:
    metrics = run.metrics(name)
    # Older runs have fewer figures.
    bound, distinct = metrics.get("divergence_bound"), metrics.get("distinct_2")
    against = by_judge = ""
    # The base policy's figures are means over samples, which win against nothing.
    if name not in ("base", best_of):
        against = format(_rate(rewards[name], rewards[best_of]), ".2f")
        if judged[name] is not None:
            by_judge = format(_rate(judged[name], judged[best_of]), ".2f")
    return {
        "name": name,
        "reward": str(bootstrap(rewards[name])),
        "judge": "" if judged[name] is None else str(bootstrap(judged[name])),
        "against": against,
        "against_judge": by_judge,
        "length": f"{metrics['mean_length']:.1f}",
        "distinct": "" if distinct is None else f"{distinct:.2f}",
        "divergence": "" if bound is None else f"{bound:.1f}",
        "tokens": f"{spent.tokens:.0f}",
    }


def _rate(first: np.ndarray, second: np.ndarray) -> Interval:
    return bootstrap(wins(first, second))


def _cost_row(name: str, spent: Spending, answers: int) -> tuple[str, ...]:
    return (
        name,
        f"{spent.tokens:.0f}",
        f"{spent.value_queries:.1f}",
        f"{spent.reward_queries:.1f}",
        f"{spent.flops / 1e9:.0f}",
        f"{spent.training_flops / 1e9:.0f}",
        f"{(spent.flops + spent.training_flops / answers) / 1e9:.0f}",
        f"{spent.seconds:.2f}",
        f"{spent.peak_memory_bytes / 2**30:.2f}",
    )


def _pay_off(
    curve: dict[int, Interval], rewards: dict[str, Any], spent: dict[str, Spending], best_of: str
) -> list[tuple[str, str, str]]:
    """For methods that are trained: the best-of-n that is as good, and the answers after which
    the training has cost less than the other's further samples."""
    one = spent[best_of].flops / max(curve)
    found = []
    for name, numbers in rewards.items():
        training = spent[name].training_flops
        if not training:
            continue
        mean = float(numbers.mean())
        enough = [n for n, interval in curve.items() if interval.mean >= mean]
        if not enough:
            found.append((name, f"more than {max(curve)}", "not known: it needs more samples"))
            continue
        saved = enough[0] * one - spent[name].flops
        pays = f"after {training / saved:,.0f} answers" if saved > 0 else "never"
        found.append((name, str(enough[0]), pays))
    return found


def _best_of_means(runs: Sequence[Run]) -> dict[int, Interval]:
    curves = [run.best_of() for run in runs]
    numbers = set.intersection(*(set(curve) for curve in curves))
    return {n: bootstrap(np.stack([curve[n] for curve in curves])) for n in sorted(numbers)}


def _pictures(
    runs: Sequence[Run],
    curve: dict[int, Interval],
    rewards: dict[str, Any],
    spent: dict[str, Spending],
    answers: int,
    best_of: str,
) -> list[tuple[str, str, str]]:
    """Titles, captions and sources."""
    candidates = runs[0].num_candidates
    shown = {
        name: numbers for name, numbers in rewards.items() if name not in ("base", "references")
    }
    points = {
        name: (bootstrap(numbers), _costs(spent[name], answers)) for name, numbers in shown.items()
    }
    best_of_costs = [
        (interval.mean, [n / candidates * x for x in _costs(spent[best_of], answers)])
        for n, interval in curve.items()
    ]
    labels = (
        "tokens an answer",
        "GFLOP an answer, training included",
        "seconds an answer, likewise",
    )
    at_budget = {
        name: (candidates, bootstrap(rewards[name]))
        for name in rewards
        if name.startswith(("iro_", "guided_sample_")) and name[-1].isdigit()
    }
    found = [
        (
            "Reward against cost",
            f"Training is spread over {answers:,} answers. Grey: the expected reward of best-of-n,"
            " from the same samples. Seconds are those of a batch, divided by its answers, without"
            " compilation and with"
            " the rewards of all candidates.",
            figures.data_uri(figures.frontier(points, best_of_costs, labels)),
        ),
        (
            "Reward against the number of candidates",
            "Best-of-n over all subsets of the same samples, and methods at their U.",
            figures.data_uri(figures.budget(curve, at_budget)),
        ),
    ]
    gap = over_iterations(runs[0].results)
    if gap is not None:
        caption = "First seed. The gap of the gains shows whether the reward is overoptimised."
        found.insert(0, ("Iterations", caption, figures.data_uri(health_plots.reward_plot(gap))))
    healths, drifts, losses = read_health(runs[0].stages)
    if healths:
        for title, caption, figure in (
            (
                "Calibration of the values",
                "Held-out prompts, by decile of the prediction.",
                health_plots.calibration_plot(healths),
            ),
            (
                "Errors by position",
                "Bias and error of the values, chunk by chunk.",
                health_plots.position_plot(healths),
            ),
            (
                "Correlation with the reward",
                "Of the value at each chunk's end with the final reward.",
                health_plots.correlation_plot(healths),
            ),
        ):
            found.append((title, caption, figures.data_uri(figure)))
    if drifts:
        caption = "What changes when a value function meets the answers that it has steered."
        found.append(("Drift", caption, figures.data_uri(health_plots.drift_plot(drifts))))
    if losses:
        caption = "On held-out prompts."
        found.append(("Losses", caption, figures.data_uri(health_plots.loss_plot(losses))))
    return found


def _costs(spent: Spending, answers: int) -> tuple[float, float, float]:
    return (
        spent.tokens,
        (spent.flops + spent.training_flops / answers) / 1e9,
        spent.seconds + spent.training_seconds / answers,
    )


def _side_by_side(run: Run, names: Sequence[str]) -> list[dict[str, Any]]:
    """Answers of all methods to the first prompts."""
    of_methods = {name: run.answers(name)[:SHOWN_PROMPTS] for name in names}
    number = min(len(rows) for rows in of_methods.values())
    return [
        {
            "prompt": of_methods[names[0]][i]["instruction"],
            "answers": [
                (name, rows[i]["output"], f"{rows[i]['reward']:.2f}")
                for name, rows in of_methods.items()
            ],
        }
        for i in range(number)
    ]


def _trees(run: Run) -> list[dict[str, Any]]:
    """Trees of all searches, with their prompts' texts."""
    prompts = {row["prompt_id"]: row["instruction"] for row in run.answers("base")}
    return [
        {"search": search, "prompt": prompts[tree["prompt_id"]], "nodes": tree["nodes"]}
        for search in run.searches
        if search != UNGUIDED
        for tree in run.trees(search)
    ]
