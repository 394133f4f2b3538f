"""Theorem 1 measured: the gap to the best policy and its bound, over the number of iterations.

    pip install iro_jax[plots]
    python -m experiments.benchmarks.theorem1 --models=20 --out=theorem1.png

For every T, each model's loop runs anew with beta_t = sqrt(t+1)/omega of that T and with exact
values (`iro_jax.exact`); rewards lie in [0, 1].

The left half of the picture shows random models. The theorem speaks of the worst one, and a
fixed model leaves its bound behind: once the policy tells the best answers apart, its gap falls
exponentially in sqrt(T / log T). The right half shows what stays near the bound, a model chosen
anew for every T: two answers, the better one of base probability 1/C, ahead by the margin that
leaves the largest gap. Its slope is the bound's, which is -1/2 + 1/(2 log T) at T: about -0.44
in the thousands. So the rate of the theorem is that of its schedule, up to a constant.

Expected with the defaults, half a minute: mean gap 3.5e-05 under a mean bound of 0.169 at
T = 32,768, slope -1.14; the worst of two answers 0.012 under 0.101, slope -0.45.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from jaxtyping import Float, Int

from iro_jax.exact import (
    AnswerTree,
    expected_rewards,
    hard_trees,
    random_trees,
    theorem_1_bound,
)
from iro_jax.schedules import betas

_MODELS = flags.DEFINE_integer("models", 20, "Random models.", lower_bound=1)
_LONGEST = flags.DEFINE_integer("longest", 32_768, "The largest T; the others halve it.", 4096)
_SEED = flags.DEFINE_integer("seed", 0, "Of the models.")
_OUT = flags.DEFINE_string("out", None, "Where to write the picture; none writes no picture.")

SHAPES = tuple(itertools.product((2, 3, 4), (2, 3, 4)))  # A, H
FITTED_FROM = 1000
"""Slopes are fitted from this T on: below it most bounds are above the largest reward."""
HARD_LOG_CONCENTRABILITY = 8.0


def gaps(tree: AnswerTree, num_iterations: int) -> Float[np.ndarray, "*batch"]:
    """J(pi*) - max_t J(pi_t) over pi_0 .. pi_{T-1}, for rewards in [0, 1]."""
    schedules = [
        betas({"name": "theorem", "log_concentrability": log_c, "r_max": 1.0}, num_iterations)
        for log_c in tree.log_concentrability
    ]
    found = expected_rewards(tree.shortfalls(), np.stack(schedules, axis=-1))
    return -found[:num_iterations].max(axis=0)


def random_models(count: int, seed: int) -> list[AnswerTree]:
    """`count` random trees, those of one shape together; half of the shapes have an EOS."""
    models = []
    for number, (vocabulary, horizon) in enumerate(SHAPES):
        batch = len(range(number, count, len(SHAPES)))
        if batch:
            has_eos = (vocabulary + horizon) % 2 == 1
            models.append(random_trees(seed + number, batch, vocabulary, horizon, has_eos=has_eos))
    return models


@dataclasses.dataclass(frozen=True)
class Curves:
    """Gaps of `n` models, and their bounds, at the `counts` of iterations."""

    title: str
    counts: Int[np.ndarray, " T"]
    gap: Float[np.ndarray, "T n"]
    bound: Float[np.ndarray, "T n"]

    @classmethod
    def measure(cls, title: str, counts: Int[np.ndarray, " T"], models: list[AnswerTree]) -> Curves:
        """The curves of all trees of all `models`, in their order."""
        gap = [np.concatenate([gaps(m, t) for m in models]) for t in counts]
        bound = [
            np.concatenate(
                [theorem_1_bound(m.log_concentrability, 1.0, m.horizon, t) for m in models]
            )
            for t in counts
        ]
        return cls(title, counts, np.array(gap), np.array(bound))

    def worst(self) -> Curves:
        """The largest gap at every T, of models that share a bound."""
        gap = self.gap.max(axis=1, keepdims=True)
        return dataclasses.replace(self, gap=gap, bound=self.bound[:, :1])

    def mean(self) -> Curves:
        """Gap and bound in the mean over the models: the theorem holds for these as well."""
        gap, bound = (x.mean(axis=1, keepdims=True) for x in (self.gap, self.bound))
        return dataclasses.replace(self, title="mean", gap=gap, bound=bound)

    def slopes(self) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Of gap and bound in log-log: least squares from `FITTED_FROM` on."""
        late = self.counts >= FITTED_FROM
        steps = np.log(self.counts[late])
        tiny = np.finfo(float).tiny
        gap, bound = (
            np.polyfit(steps, np.log(np.maximum(curve[late], tiny)), 1)[0]
            for curve in (self.gap, self.bound)
        )
        return gap, bound

    def rows(self, names: Sequence[str]) -> Iterator[str]:
        """The table: gap and bound at the largest T, and slopes."""
        columns = zip(names, self.gap[-1], self.bound[-1], *self.slopes(), strict=True)
        for name, gap, bound, falls, allowed in columns:
            yield f"{name:23} {gap:9.1e} {bound:6.3f} {falls:8.2f} {allowed:6.2f}"


def draw(path: str, panels: Sequence[Curves]) -> None:
    """Writes the picture, a panel for each of `panels`; means are bold."""
    figure, axes = _pyplot().subplots(1, len(panels), figsize=(11, 4.5), layout="constrained")
    for axis, curves in zip(axes, panels, strict=True):
        mean = curves.mean()
        many = "mean " if curves.gap.shape[1] > 1 else ""
        for name, colour, [slope] in zip(
            ("gap", "bound"), ("tab:blue", "tab:red"), mean.slopes(), strict=True
        ):
            if many:
                every = getattr(curves, name)
                axis.loglog(curves.counts, every, color=colour, alpha=0.25, linewidth=0.8)
            label = f"{many}{name}, slope {slope:.2f}"
            axis.loglog(
                curves.counts, getattr(mean, name), color=colour, linewidth=2.2, label=label
            )
        axis.axhline(0.5, color="grey", linestyle=":", label="half of the largest reward")
        axis.set(title=curves.title, xlabel="iterations T", ylim=(1e-5, 2 * curves.bound.max()))
        axis.legend(loc="lower left", framealpha=1.0)
    axes[0].set_ylabel("J(best policy) - J(best iterate)")
    figure.savefig(path, dpi=150)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise app.UsageError(
            "--out draws with matplotlib, which is not installed: pip install iro_jax[plots]"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def main(argv: list[str]) -> None:
    del argv
    if _OUT.value:
        _pyplot()  # before the work
    longest = _LONGEST.value
    counts = np.array([longest >> n for n in range(longest.bit_length() - 1)])[::-1]
    models = random_models(_MODELS.value, _SEED.value)
    random = Curves.measure(f"{_MODELS.value} random models", counts, models)
    title = f"the worst of two answers, log C = {HARD_LOG_CONCENTRABILITY:g}"
    hard = Curves.measure(title, counts, [hard_trees(HARD_LOG_CONCENTRABILITY)]).worst()

    print(f"T = {counts[0]} .. {longest}; slopes are fitted from T = {FITTED_FROM} on")
    print(f"{' A  H  log C_ST    base':23} {'gap':>9} {'bound':>6} {'slopes':>8} {'bound':>6}")
    names = []
    for model in models:
        base = -expected_rewards(model.shortfalls(), np.ones(0))[0]
        for log_c, first in zip(model.log_concentrability, base, strict=True):
            names.append(f"{model.vocabulary:2} {model.horizon:2} {log_c:9.2f} {first:7.3f}")
    print(*random.rows(names), *random.mean().rows(["mean"]), sep="\n")
    print(*hard.rows(["worst of two answers"]), sep="\n")
    for curves in (random, hard):
        ratio = (curves.gap / curves.bound).max()
        print(f"largest gap / bound at any T, {curves.title}: {ratio:.3f}")
    if _OUT.value:
        draw(_OUT.value, [random, hard])


if __name__ == "__main__":
    app.run(main)
