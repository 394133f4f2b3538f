"""Answers of a guided policy, with their rewards, on disk: shard by shard.

Rollouts to train on and answers to evaluate are the same thing here: every finalist of a
guided search, scored by a reward and kept in a `RolloutStore`. A shard is a fixed list of
prompts, searched in batches that depend on these prompts alone, so that one that a kill has
left out is sampled again to the last bit. Several hosts share the shards of a store.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from iro_jax import hosts
from iro_jax.data import Prompt, Rollout, RolloutError, RolloutStore
from iro_jax.evaluation import Cost, Ledger, Reader, reward_cost, trace_cost
from iro_jax.evaluation.ledger import Phase
from iro_jax.files import write_atomic
from iro_jax.guidance import (
    Guide,
    Guided,
    GuidedAnswer,
    LogRatio,
    LogRatioParams,
    TreeNode,
    Watching,
    function_scorer,
    reads_policy,
    shared_passes,
    watching,
)
from iro_jax.methods import Method
from iro_jax.models import Pretrained, Sampling, TextFormat
from iro_jax.rewards import Reward, check_rewards
from iro_jax.search import SelectFn, diversity_first
from iro_jax.values import FunctionReward, ValueFunction

TREES = "trees.json"
"""Beside the shards of an evaluation's search: the trees of its first prompts."""

NUM_TREES = 4


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """How answers are searched for; see `iro_jax.guidance.Guide`.

    Attributes:
      max_new_tokens: H.
      beam_width, num_successors, chunk_length: K, B, L.
      sampling: how the policy's tokens are drawn.
      stop_strings: texts that end an answer, and are cut off.
      end_characters: an answer also ends with a token whose text ends in one of these.
      select_fn: which candidates survive.
      text_format: how prompts are rendered.
      batch_size: prompts a program call.
      shard_size: prompts that are searched, and stored, at a time.
      seed: of all draws.
    """

    max_new_tokens: int = 256
    beam_width: int = 4
    num_successors: int = 4
    chunk_length: int = 16
    sampling: Sampling = Sampling()
    stop_strings: tuple[str, ...] = ()
    end_characters: str = ""
    select_fn: SelectFn = diversity_first
    text_format: TextFormat = TextFormat()
    batch_size: int = 8
    shard_size: int = 32
    seed: int = 0

    @property
    def num_candidates(self) -> int:
        """U."""
        return self.beam_width * self.num_successors


@dataclasses.dataclass(frozen=True)
class Guidance:
    """What guides a search: the sum of V_t / beta_t, or nothing.

    Attributes:
      functions: V_0, V_1, ...; for a method that a reward guides, the reward model.
      betas: of each of them.
      method: how the search uses them; None for the search of the settings.
      log_ratio: the tuned and the untuned model, for a method that their log-ratio guides.
    """

    functions: tuple[ValueFunction, ...] = ()
    betas: tuple[float, ...] = ()
    method: Method | None = None
    log_ratio: tuple[Pretrained, Pretrained] | None = None


class Collector:
    """Searches prompts and keeps what it finds.

    Args:
      policy: the frozen model.
      reward: of whole answers.
      settings: of the search. Unguided, there is one chunk of the whole length: the
        candidates are then independent samples, those of best-of-N.
      config_hash: of everything the answers depend on.
      ledger: where costs are written down.
      reward_reader: what the reward reads with, for its FLOPs; None if that is unknown.
      progress: whether to show bars.
    """

    def __init__(
        self,
        policy: Pretrained,
        reward: Reward,
        settings: SearchSettings,
        *,
        config_hash: str,
        ledger: Ledger,
        reward_reader: Reader | None = None,
        progress: bool = False,
    ):
        self.policy = policy
        self.reward = reward
        self.settings = settings
        self.config_hash = config_hash
        self.ledger = ledger
        self.reward_reader = reward_reader
        self.progress = progress

    def __call__(
        self,
        folder: Path,
        prompts: Sequence[Prompt],
        guidance: Guidance,
        *,
        stage: str,
        phase: Phase,
        iteration: int = 0,
        select_fn: SelectFn | None = None,
    ) -> RolloutStore:
        """Fills a store with the finalists of every prompt.

        Args:
          folder: of the store; shards that are there already stay.
          guidance: of the search.
          stage: its name in the cost ledger.
          phase: `training` or `inference`, for the ledger.
          iteration: of the loop.
          select_fn: which candidates survive, if not those of the settings.

        Raises:
          RolloutError: a stored shard is damaged or answers another prompt of the same id, or the
            disk is full.
          ValueError: a prompt is too long (nothing has been sampled then), or a value or reward
            is not finite.
        """
        size = self.settings.shard_size
        plan = [list(prompts[start : start + size]) for start in range(0, len(prompts), size)]
        if hosts.first():
            store = RolloutStore.create(
                folder, config_hash=self.config_hash, plan=[[p.id for p in shard] for shard in plan]
            )
        hosts.meet(f"plan of {stage}")
        if not hosts.first():
            store = RolloutStore.open(folder)
        store.verify()
        _check_prompts(store, prompts)
        if store.complete:
            return store
        readers = value_readers(self.policy, guidance)
        guide = self.guide(
            guidance,
            chat=_chat(prompts),
            select_fn=select_fn,
            # A fit needs the hidden states that a reward reads; an evaluation does not.
            watch=phase == "inference",
        )
        guide.check([prompt.conversation for prompt in prompts])
        together = hosts.count()
        missing = store.missing()[hosts.index() :: together]
        mine = sum(len(plan[number]) for number in missing)
        done = sum(len(shard.prompts) for shard in store.shards if shard.written)
        # Reports show the evaluation's.
        shown = NUM_TREES if phase == "inference" else 0
        with tqdm(
            total=done + mine, initial=done, unit="prompt", desc=stage, disable=not self.progress
        ) as bar:
            for number in missing:
                with self.ledger.measure(stage, str(number), phase) as cost:
                    found = self._search(
                        guide, plan[number], iteration, trees=0 if number else shown
                    )
                    rollouts = self._rewarded(guide, plan[number], found, iteration)
                    self._bill(cost, guide, readers, found, rollouts)
                if shown and number == 0:
                    self._write_trees(folder / TREES, plan[number], found, _watches(guide))
                # A killed run may pay for a shard twice, but never forgets what one has cost.
                store.write(number, rollouts, enter=together == 1)
                bar.update(len(plan[number]))
        if together > 1:
            store = _adopted(store, stage)
        return store

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Looks for prompts that the policy cannot read; samples nothing.

        Raises:
          ValueError: one is empty or too long, or raw prompts and conversations are mixed.
        """
        unguided = self.guide(Guidance(), chat=_chat(prompts))
        unguided.check([prompt.conversation for prompt in prompts])

    def guide(
        self,
        guidance: Guidance,
        *,
        chat: bool,
        select_fn: SelectFn | None = None,
        watch: bool = False,
    ) -> Guide:
        """The text interface of one guided policy.

        Args:
          guidance: of the search.
          chat: whether prompts are conversations.
          select_fn: which candidates survive, if not those of the settings.
          watch: whether the search may tell the reward of its answers, where that is a head on
            the policy's own hidden states.
        """
        chosen = self.settings
        method = self.method(guidance, select_fn)
        length = method.chunk_length or chosen.max_new_tokens
        return Guide(
            self.policy,
            sampling=method.sampling or chosen.sampling,
            beam_width=method.beam_width,
            num_successors=method.num_successors,
            chunk_length=length,
            max_new_tokens=chosen.max_new_tokens,
            select_fn=method.select_fn,
            successors=method.successors,
            segments=method.segments,
            answers=method.answers,
            stop_strings=chosen.stop_strings,
            end_characters=chosen.end_characters,
            batch_size=chosen.batch_size,
            text_format=chosen.text_format,
            **self._scorer(guidance, method, length, chat, watch=watch),
        )

    def method(self, guidance: Guidance, select_fn: SelectFn | None = None) -> Method:
        """The guidance's own, or the search of the settings; unguided, one chunk of all tokens."""
        if guidance.method is not None:
            return guidance.method
        chosen = self.settings
        return Method(
            "own",
            "values" if guidance.functions else "nothing",
            chosen.beam_width,
            chosen.num_successors,
            chosen.chunk_length if guidance.functions else None,
            select_fn or chosen.select_fn,
        )

    def _scorer(
        self, guidance: Guidance, method: Method, chunk_length: int, chat: bool, *, watch: bool
    ) -> dict[str, Any]:
        """The arguments of `Guide` that say what guides."""
        found = self._guiding(guidance, method, chunk_length, chat)
        reward = self.reward
        # A stop string is cut off before a reward reads the answer, but not in the search.
        if (
            watch
            and isinstance(reward, FunctionReward)
            and reads_policy(reward.function, self.policy)
            and found.get("scorer_tokenizer") is None
            and not self.settings.stop_strings
        ):
            found["scorer"], found["scorer_params"] = watching(
                self.policy, reward.function, found.get("scorer"), found.get("scorer_params")
            )
        return found

    def _guiding(
        self, guidance: Guidance, method: Method, chunk_length: int, chat: bool
    ) -> dict[str, Any]:
        """The same, without what only looks on."""
        if method.guide == "nothing":
            return {}
        if method.guide == "log_ratio":
            if guidance.log_ratio is None:
                raise ValueError(f"{method.name} needs a tuned and an untuned model. Got: none")
            tuned, untuned = guidance.log_ratio
            return {
                "scorer": LogRatio(tuned.network, untuned.network),
                "scorer_params": LogRatioParams(tuned.params, untuned.params),
            }
        parts = function_scorer(
            self.policy,
            [method.seen_by(function) for function in guidance.functions],
            [beta / method.weight for beta in guidance.betas],
            chunk_length=chunk_length,
            chat=chat,
        )
        return dict(zip(("scorer", "scorer_params", "scorer_tokenizer"), parts, strict=True))

    def _search(
        self, guide: Guide, prompts: Sequence[Prompt], iteration: int, *, trees: int
    ) -> list[Guided]:
        return guide(
            [prompt.conversation for prompt in prompts],
            seed=self.settings.seed,
            # Prompts that come up again in a later iteration get other draws.
            prompt_ids=[f"{p.id}@{iteration}" if iteration else p.id for p in prompts],
            trees=trees,
        )

    def _rewarded(
        self, guide: Guide, prompts: Sequence[Prompt], found: Sequence[Guided], iteration: int
    ) -> list[Rollout]:
        pairs = [
            (prompt, answer)
            for prompt, guided in zip(prompts, found, strict=True)
            for answer in guided.answers
        ]
        asked, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
        if _watches(guide):
            rewards = check_rewards([answer.values[-1] for answer in answers], asked)
        else:
            rewards = check_rewards(self.reward(asked, answers), asked)
        rollouts: list[Rollout] = []
        for prompt, guided in zip(prompts, found, strict=True):
            start = len(rollouts)
            of_prompt = rewards[start : start + len(guided.answers)]
            tokens = guide.render(prompt.conversation)
            rollouts += _rollouts(prompt, tokens, guided, of_prompt, iteration)
        return rollouts

    @staticmethod
    def _write_trees(
        path: Path, prompts: Sequence[Prompt], found: Sequence[Guided], watched: bool
    ) -> None:
        """The search trees of a few prompts, for reports: what has guided them."""

        def guiding(node: TreeNode) -> dict[str, Any]:
            fields = node.to_json()
            return fields | {"values": fields["values"][:-1]} if watched else fields

        trees = [
            {"prompt_id": prompt.id, "nodes": [guiding(node) for node in guided.tree]}
            for prompt, guided in zip(prompts[:NUM_TREES], found, strict=False)
        ]
        write_atomic(path, json.dumps(trees, ensure_ascii=False) + "\n")

    def _bill(
        self,
        cost: Cost,
        guide: Guide,
        readers: Sequence[Reader],
        found: Sequence[Guided],
        rollouts: Sequence[Rollout],
    ) -> None:
        first = {rollout.prompt.id: len(rollout.prompt_tokens) for rollout in rollouts}
        cost += trace_cost(
            self.policy.network.config,
            readers,
            prompt_tokens=list(first.values()),
            chunk_lengths=np.stack([guided.chunk_lengths for guided in found], axis=1),
            chunk_length=guide.search.chunk_length,
        )
        lengths = [len(r.prompt_tokens) + len(r.tokens) for r in rollouts]
        if self.reward_reader is None:
            cost.reward_queries += len(rollouts)
        elif _watches(guide):
            # A head whose hidden states the search had computed.
            cost += reward_cost(dataclasses.replace(self.reward_reader, layers=0), lengths)
        else:
            cost += reward_cost(self.reward_reader, lengths)


def _adopted(store: RolloutStore, stage: str) -> RolloutStore:
    """The store with what every host has written."""
    hosts.meet(f"shards of {stage}")
    if hosts.first():
        store.adopt()
    hosts.meet(f"manifest of {stage}")
    return RolloutStore.open(store.folder)


def _watches(guide: Guide) -> bool:
    return isinstance(guide.search.scorer, Watching)


def _check_prompts(store: RolloutStore, prompts: Sequence[Prompt]) -> None:
    """A file of prompts may have been changed since a killed run read it."""
    wanted = {prompt.id: prompt for prompt in prompts}
    for rollout in store.all():
        if rollout.prompt != wanted[rollout.prompt.id]:
            raise RolloutError(
                f"{store.folder} has answers to another prompt of the id {rollout.prompt.id!r}: the"
                " prompts were changed after it was written. Use another workdir, or delete it"
            )


def _chat(prompts: Sequence[Prompt]) -> bool:
    """Whether prompts are conversations."""
    first, *kinds = {not isinstance(prompt.conversation, str) for prompt in prompts}
    if kinds:
        raise ValueError(
            "The prompts of a run must be all raw text or all conversations. Got: both"
        )
    return first


def value_readers(policy: Pretrained, guidance: Guidance) -> list[Reader]:
    """What the cost ledger has to know about a guide; heads on the policy read nothing."""
    if guidance.log_ratio is not None:
        return [Reader(model.network.config, logits=True) for model in guidance.log_ratio]
    functions = guidance.functions
    if all(reads_policy(function, policy) for function in functions):
        return [function_reader(function, layers=0) for function in functions]
    return [
        dataclasses.replace(function_reader(group[0]), num_values=len(group))
        for group in shared_passes(functions)
    ]


def function_reader(function: ValueFunction, *, layers: int | None = None) -> Reader:
    """One value function as the cost ledger sees it; `layers` are those that are run for it."""
    config, adapters = function.network.network.config, function.params.adapters
    rank = 0 if not adapters else next(iter(adapters[0].values())).down.shape[-1]
    return Reader(config, function.network.layer if layers is None else layers, lora_rank=rank)


def _rollouts(
    prompt: Prompt,
    prompt_tokens: np.ndarray,
    guided: Guided,
    rewards: np.ndarray,
    iteration: int,
) -> list[Rollout]:
    best = int(np.argmax(rewards))

    def rollout(index: int, answer: GuidedAnswer) -> Rollout:
        return Rollout(
            prompt=prompt,
            prompt_tokens=prompt_tokens,
            tokens=np.asarray(answer.tokens, np.int32),
            text=answer.text,
            finished=answer.finished,
            reward=float(rewards[index]),
            log_probs=np.asarray(answer.log_probs, np.float32),
            iteration=iteration,
            candidate=index,
            selected=index == best,
            score=answer.score,
        )

    return [rollout(index, answer) for index, answer in enumerate(guided.answers)]
