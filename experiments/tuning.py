"""Rivals that touch weights, on a run's task.

    python -m experiments.tuning --config=configs/tuning.py --workdir=runs/tuning

    pairs          the frozen policy's answers to training prompts, by their reward
    reward_model   from the pairs (Bradley-Terry); it picks from the frozen policy's answers
    dpo            from the pairs
    grpo, irepo    from the answers that they sample themselves, round by round

Each is a stage of the run and ends in a folder that `from_pretrained` opens. All policies then
answer the same held-out prompts by plain sampling.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from ml_collections import ConfigDict

from experiments import command
from experiments.settings import search_settings
from experiments.sources import check_sources, policy_source
from experiments.tasks import Context, Task, build_task
from experiments.tasks.rewards import build_reward
from iro_jax import baselines
from iro_jax.baselines import OnlineSettings, Pair, TuningSettings
from iro_jax.baselines.policies import answer_log_probs, common_length
from iro_jax.collect import Collector, Guidance, SearchSettings
from iro_jax.data import Prompt, Rollout, RolloutStore, subset
from iro_jax.evaluation import Ledger, bootstrap, markdown_table, paired
from iro_jax.evaluation.ledger import Phase
from iro_jax.files import write_atomic
from iro_jax.models import Pretrained, from_pretrained, save_pretrained
from iro_jax.rewards import Reward, TextAnswer, check_rewards
from iro_jax.values import AnswerTokens, FitSettings, Head, new_head, save_value
from iro_jax.values import from_pretrained as load_value
from iro_jax.values.prefixes import prefix_values
from iro_jax.workdir import Workdir

Groups: TypeAlias = list[list[Rollout]]
"""Answers, prompt by prompt."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all methods share."""

    config: ConfigDict
    workdir: Workdir
    policy: Pretrained
    task: Task
    tokens: AnswerTokens
    search: SearchSettings
    ledger: Ledger
    annotators: tuple[Reward, ...]
    progress: bool

    def answers(
        self,
        name: str,
        policy: Pretrained,
        prompts: Sequence[Prompt],
        count: int,
        phase: Phase,
    ) -> RolloutStore:
        """So many samples of a policy for each prompt, with their rewards."""
        settings = dataclasses.replace(self.search, beam_width=1, num_successors=count)
        collector = Collector(
            policy,
            self.task.reward,
            settings,
            config_hash=self.workdir.config_hash,
            ledger=self.ledger,
            reward_reader=self.task.reward_reader,
            progress=self.progress,
        )
        folder = self.workdir / name / "answers"
        return collector(folder, prompts, Guidance(), stage=f"{name}/answers", phase=phase)

    def pairs(self) -> tuple[list[Pair], list[Pair]]:
        """Of the frozen policy's answers, to train on and held out."""
        chosen = self.config.tuning
        prompts = subset(self.task.train, 0, chosen.num_prompts, self.config.seed)
        store = self.answers("pairs", self.policy, prompts, self.search.num_candidates, "training")
        of_each = _groups(store)
        held_out = max(1, round(chosen.held_out * len(of_each)))
        make = functools.partial(ranked_pairs, count=chosen.pairs_per_prompt)
        train = [pair for rollouts in of_each[held_out:] for pair in make(rollouts)]
        return train, [pair for rollouts in of_each[:held_out] for pair in make(rollouts)]

    def tuning(self, name: str) -> TuningSettings:
        chosen = self.config.tuning[name]
        return TuningSettings(
            chosen.trainable,
            rank=chosen.rank,
            remat=chosen.remat,
            fit=FitSettings(**chosen.fit, seed=self.config.seed),
            seed=self.config.seed,
        )

    def online(self, name: str) -> OnlineSettings:
        chosen = self.config.tuning[name]
        return OnlineSettings(
            rounds=chosen.rounds,
            prompts_per_round=chosen.prompts_per_round,
            answers=chosen.answers,
            max_new_tokens=self.search.max_new_tokens,
            sampling=self.search.sampling,
            batch_size=self.search.batch_size,
            seed=self.config.seed,
        )


def ranked_pairs(rollouts: Sequence[Rollout], *, count: int) -> list[Pair]:
    """The best with the middle one, the second with the one after it, and so on."""
    ordered = sorted(rollouts, key=lambda rollout: -rollout.reward)
    middle = len(ordered) // 2
    return [
        Pair(better.prompt, _answer(better), _answer(worse))
        for better, worse in list(zip(ordered, ordered[middle:], strict=False))[:count]
        if better.reward > worse.reward
    ]


def dpo(bench: Bench, folder: Path) -> Pretrained:
    train, held_out = bench.pairs()
    tuned = baselines.tune_dpo(
        bench.policy,
        train,
        held_out,
        bench.tokens,
        bench.tuning("dpo"),
        beta=bench.config.tuning.dpo.beta,
        folder=folder,
        progress=bench.progress,
    )
    return tuned.policy


def grpo(bench: Bench, folder: Path) -> Pretrained:
    chosen = bench.config.tuning.grpo
    tuned = baselines.tune_grpo(
        bench.policy,
        bench.task.train,
        bench.task.reward,
        bench.tokens,
        bench.online("grpo"),
        bench.tuning("grpo"),
        clip=chosen.clip,
        beta=chosen.beta,
        folder=folder,
        on_round=_tell if bench.progress else None,
    )
    return tuned.policy


def irepo(bench: Bench, folder: Path) -> Pretrained:
    chosen = bench.config.tuning.irepo
    tuned = baselines.tune_irepo(
        bench.policy,
        bench.task.train,
        [bench.task.reward, *bench.annotators],
        bench.tokens,
        bench.online("irepo"),
        bench.tuning("irepo"),
        beta=chosen.beta,
        label_clip=chosen.label_clip,
        folder=folder,
        on_round=_tell if bench.progress else None,
    )
    return tuned.policy


POLICIES: dict[str, Callable[[Bench, Path], Pretrained]] = {
    "dpo": dpo,
    "grpo": grpo,
    "irepo": irepo,
}
REWARD_MODEL = "picked by a reward model from pairs"


def run(config: ConfigDict, folder: Path, *, progress: bool) -> str:
    """Runs or continues all methods; returns the table."""
    unknown = set(config.tuning.methods) - {"reward_model", *POLICIES}
    if unknown:
        raise ValueError(f"tuning.methods must be of {('reward_model', *POLICIES)}. Got: {unknown}")
    bench = _bench(config, folder, progress)
    # Before anything is timed: two methods share them.
    if {"reward_model", "dpo"} & set(config.tuning.methods):
        bench.pairs()
    prompts, count = bench.task.evaluation, config.tuning.answers
    base = _groups(bench.answers("base", bench.policy, prompts, count, "inference"))
    found = {"base": _figures(bench, base)}
    rewards = np.asarray([rollout.reward for some in base for rollout in some])
    found[f"best of {count} by the reward"] = _figures(bench, _best(base, rewards))
    if "reward_model" in config.tuning.methods:
        scores = _scores(bench, [rollout for some in base for rollout in some])
        found[REWARD_MODEL] = _figures(bench, _best(base, scores))
    for name, tune in POLICIES.items():
        if name in config.tuning.methods:
            policy = _tuned(bench, name, tune)
            own = _groups(bench.answers(name, policy, prompts, count, "inference"))
            found[name] = _figures(bench, own, tuned=True)
    text = _table(bench.workdir, found)
    write_atomic(folder / "table.md", text)
    return text


def _bench(config: ConfigDict, folder: Path, progress: bool) -> Bench:
    search = search_settings(config)
    check_sources(config)
    workdir = Workdir(folder, config.to_dict())
    ledger = Ledger(workdir / "cost.jsonl")
    place = policy_source(config).place
    policy = from_pretrained(place, dtype=config.policy.dtype)
    assert policy.tokenizer is not None
    task = build_task(Context(config, policy, place, workdir, ledger, progress))
    search = dataclasses.replace(search, text_format=task.text_format)
    tokens = AnswerTokens(policy.tokenizer, policy, text_format=task.text_format)
    annotators = tuple(
        build_reward(
            ConfigDict({"kind": kind, "target": None}), None, policy.tokenizer, task.text_format
        )
        for kind in config.tuning.irepo.annotators
        if "irepo" in config.tuning.methods
    )
    return Bench(config, workdir, policy, task, tokens, search, ledger, annotators, progress)


def _tuned(bench: Bench, name: str, tune: Callable[[Bench, Path], Pretrained]) -> Pretrained:
    """A stage: the policy is trained, exported and read back."""
    folder = bench.workdir / name
    if not bench.workdir.done(name):
        with bench.ledger.measure(name, "fit", "training"):
            policy = tune(bench, folder / "checkpoints")
        shutil.rmtree(folder / "export", ignore_errors=True)
        save_pretrained(policy, folder / "export")
        bench.workdir.finish(name, {"seconds": bench.ledger.totals(stage=name).seconds})
    return from_pretrained(folder / "export")


def _scores(bench: Bench, rollouts: Sequence[Rollout]) -> np.ndarray:
    """By a reward model from pairs, which is a stage of the run."""
    name, folder, config = "reward_model", bench.workdir / "reward_model", bench.config
    if not bench.workdir.done(name):
        untrained = new_head(bench.policy, Head(), source=policy_source(config).place)
        # From zero, so that the first reward of every text is the same.
        zero = jax.tree.map(jnp.zeros_like, untrained.params.head)
        untrained = untrained.with_params(dataclasses.replace(untrained.params, head=zero))
        pairs = bench.pairs()
        with bench.ledger.measure(name, "fit", "training"):
            tuned = baselines.tune_reward(
                untrained,
                *pairs,
                bench.tokens,
                FitSettings(**config.tuning.reward_model.fit, seed=config.seed),
                folder=folder / "checkpoints",
                progress=bench.progress,
            )
        shutil.rmtree(folder / "export", ignore_errors=True)
        save_value(tuned.function, folder / "export")
        seconds = bench.ledger.totals(stage=name).seconds
        bench.workdir.finish(name, {"seconds": seconds, "pair_accuracy": tuned.accuracy})
    function = load_value(folder / "export")
    values = prefix_values(function, [bench.tokens(r.prompt, r) for r in rollouts])
    return np.asarray([of_prefixes[-1] for of_prefixes in values])


def _groups(store: RolloutStore) -> Groups:
    found: dict[str, list[Rollout]] = {}
    for rollout in store.all():
        found.setdefault(rollout.prompt.id, []).append(rollout)
    return list(found.values())


def _split(numbers: np.ndarray, groups: Groups) -> list[np.ndarray]:
    return np.split(numbers, np.cumsum([len(some) for some in groups])[:-1])


def _best(groups: Groups, scores: np.ndarray) -> Groups:
    """The one of the highest score for each prompt."""
    of_each = zip(groups, _split(scores, groups), strict=True)
    return [[some[int(np.argmax(own))]] for some, own in of_each]


def _figures(bench: Bench, groups: Groups, *, tuned: bool = False) -> dict[str, np.ndarray]:
    """Means over each prompt's answers: reward, judge, and log-ratio to the frozen policy."""
    flat = [rollout for some in groups for rollout in some]
    prompts = [rollout.prompt for rollout in flat]
    found = {"reward": np.asarray([rollout.reward for rollout in flat])}
    if bench.task.judge is not None:
        judged = bench.task.judge(prompts, [_answer(rollout) for rollout in flat])
        found["judge"] = check_rewards(judged, prompts)
    if tuned:
        readings = [bench.tokens(rollout.prompt, rollout) for rollout in flat]
        length = common_length(readings)
        before = answer_log_probs(bench.policy, readings, length=length).sum(axis=1)
        found["divergence"] = np.asarray([r.log_probs.sum() for r in flat]) - before
    return {
        kind: np.asarray([own.mean() for own in _split(numbers, groups)])
        for kind, numbers in found.items()
    }


def _table(workdir: Workdir, found: dict[str, dict[str, np.ndarray]]) -> str:
    rows = []
    for name, figures in found.items():
        stage = "reward_model" if name == REWARD_MODEL else name
        facts = workdir.result(stage) if workdir.done(stage) else {}
        gain = paired(figures["reward"], found["base"]["reward"])
        rows.append(
            (
                name,
                str(bootstrap(figures["reward"])),
                "" if name == "base" else str(gain),
                str(bootstrap(figures["judge"])) if "judge" in figures else "",
                str(bootstrap(figures["divergence"])) if "divergence" in figures else "",
                f"{facts['pair_accuracy']:.3f}" if "pair_accuracy" in facts else "",
                f"{facts['seconds']:.0f}" if facts else "",
            )
        )
    header = ("method", "reward", "gain", "judge", "KL from the policy", "pairs told", "seconds")
    return markdown_table(header, rows)


def _answer(rollout: Rollout) -> TextAnswer:
    return TextAnswer(rollout.text, tuple(map(int, rollout.tokens)), rollout.finished)


def _tell(found: baselines.Round) -> None:
    print(f"mean reward of the answers that this round trained on: {found.mean_reward:.3f}")


def main(argv: Sequence[str]) -> None:
    config = command.CONFIG.value
    folder = Path(command.WORKDIR.value or Path("runs") / config.name)
    with command.started(argv):
        print(run(config, folder, progress=command.PROGRESS.value))


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse_flags)
