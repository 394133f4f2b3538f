"""What else a run can be compared with: other methods on the same models, at the same tokens.

Every method gets U = K * B candidates of H tokens: U samples, U proposals or blocks at a time, or
the U most probable tokens at every step. What cannot be run here is told in one line and left out.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from experiments.sources import LOG_RATIO_RIVALS
from experiments.tasks import Task
from iro_jax import methods
from iro_jax.collect import Guidance
from iro_jax.iro import IRO, Learned
from iro_jax.methods import Method
from iro_jax.models import Pretrained, from_pretrained, same_tokenizer
from iro_jax.models.sharding import mesh_of
from iro_jax.models.weights.sources import open_checkpoint
from iro_jax.values import Head, NextStates, ValueFitter
from iro_jax.values.objectives import LossName


class Unavailable(Exception):
    """What a method needs is not there."""


@dataclasses.dataclass(frozen=True)
class Arena:
    """What methods are built from: a run that has learned its value functions.

    Attributes:
      config: of the run.
      policy: its frozen model.
      task: with its reward.
      loop: with the rollouts.
      learned: value functions.
    """

    config: ConfigDict
    policy: Pretrained
    task: Task
    loop: IRO
    learned: Learned

    @property
    def num_candidates(self) -> int:
        """U."""
        return self.config.search.beam_width * self.config.search.num_successors

    def reward(self) -> Guidance:
        """The reward model on prefixes."""
        if self.task.prefix_reward is None:
            raise Unavailable("the reward is no model that reads prefixes")
        return Guidance((self.task.prefix_reward,), (1.0,))

    def first_value(self) -> Guidance:
        """V_0, fitted to the policy's own answers by regression: FUDGE, where that is the loss."""
        # Their own weights multiply it, not the loop's beta.
        return Guidance(self.learned.functions[:1], (1.0,))

    def distribution(self) -> Guidance:
        """The reward's distribution, fitted to the same answers.

        Bernoulli where rewards are 0 or 1, with eleven atoms elsewhere.
        """
        rewards = [rollout.reward for rollout in self.loop.store(0).all()]
        low, high = float(np.min(rewards)), float(np.max(rewards))
        if not low < high:
            raise Unavailable(f"all rewards are {low}")
        own = self.loop.fitter
        before = own.settings.head or self.loop.start.network.head
        hidden, bias = ((), True) if before is None else (before.hidden, before.bias)
        loss: LossName = "categorical"
        head = Head(hidden, bias, "categorical", num_atoms=11, support=(low, high))
        if set(rewards) <= {0.0, 1.0}:
            loss, head = "verifiable", Head(hidden, bias, "sigmoid")
        settings = dataclasses.replace(own.settings, loss=loss, head=head, normalise=False)
        fitter = ValueFitter(settings, own.tokens, states=own.states, progress=own.progress)
        return Guidance((self.loop.fit_other("rivals/categorical", fitter),), (1.0,))

    def expectation(self) -> Guidance:
        """A value function that expects its own value after the policy's next token: CD-Q."""
        own = self.loop.fitter
        if own.states is None or own.states.model is not self.policy:
            raise Unavailable("CD-Q fits heads on the policy's own hidden states")
        if own.settings.loss == "categorical":
            raise Unavailable("CD-Q fits values, and this run's heads give distributions")
        settings = dataclasses.replace(own.settings, loss="cdq")
        fitter = ValueFitter(
            settings,
            own.tokens,
            states=own.states,
            next_states=next_states(self.config, self.policy),
            progress=own.progress,
        )
        return Guidance((self.loop.fit_other("rivals/cdq", fitter),), (1.0,))

    @functools.cached_property
    def pair(self) -> tuple[Pretrained, Pretrained]:
        """The tuned and the untuned model, read once for all methods."""
        chosen = self.config.eval
        load = functools.partial(from_pretrained, mesh=mesh_of(self.policy.params))
        return load(chosen.tuned), load(chosen.untuned)

    def log_ratio(self) -> Guidance:
        """A tuned and an untuned model that read what the policy writes."""
        if None in (self.config.eval.tuned, self.config.eval.untuned):
            raise Unavailable("there is no tuned model (eval.tuned, eval.untuned)")
        tuned, untuned = self.pair
        for model in (tuned, untuned):
            if not same_tokenizer(model.tokenizer, self.policy.tokenizer):
                raise Unavailable(f"{model.origin} has another tokenizer than the policy")
            if model.network.config.vocab_size < self.policy.network.config.vocab_size:
                raise Unavailable(f"{model.origin} knows fewer tokens than the policy")
        return Guidance(log_ratio=(tuned, untuned))

    def goal(self) -> float:
        """r* of CARDS: what one in U of the policy's own answers reaches."""
        rewards = [rollout.reward for rollout in self.loop.store(0).all()]
        return float(np.quantile(rewards, 1 - 1 / self.num_candidates))


def next_states(config: ConfigDict, policy: Pretrained) -> NextStates:
    """What the loss `cdq` reads."""
    value = config.value
    temperature = config.search.sampling.temperature
    return NextStates(policy, value.layer, count=value.next_tokens, temperature=temperature)


def check_rivals(config: ConfigDict) -> None:
    """Looks for what would stop a run at its end.

    Raises:
      ValueError: `config.eval.rivals` names a method that there is not.
      CheckpointError: there is no model at `config.eval.tuned` or `config.eval.untuned`.
    """
    for name in config.eval.rivals:
        if name not in BUILDERS:
            raise ValueError(f"eval.rivals must be of {tuple(BUILDERS)}. Got: {name!r}")
    if not set(config.eval.rivals) & set(LOG_RATIO_RIVALS):
        return
    for name in (config.eval.tuned, config.eval.untuned):
        if name is not None:
            open_checkpoint(name)


def rivals(arena: Arena) -> dict[str, Guidance]:
    """The searches of `config.eval.rivals`, by name."""
    found = {}
    for name in arena.config.eval.rivals:
        try:
            guide, method = BUILDERS[name](arena)
        except Unavailable as error:
            logging.warning("%s is left out: %s", name, error)
            continue
        found[name] = dataclasses.replace(guide, method=method)
    return found


def _args(arena: Arena, temperature: float | None = None) -> tuple[Guidance, Method]:
    return arena.reward(), methods.args(k=arena.num_candidates, temperature=temperature)


def _cards(arena: Arena) -> tuple[Guidance, Method]:
    method = methods.cards(
        arena.goal(), arena.config.search.max_new_tokens, proposals=arena.num_candidates
    )
    return arena.reward(), method


def _q_sharp(arena: Arena) -> tuple[Guidance, Method]:
    guide = arena.distribution()
    head = guide.functions[0].network.head
    assert head is not None
    low, high = head.support if head.output == "categorical" else (0.0, 1.0)
    # The paper's eta is for rewards between 0 and 1.
    return guide, methods.q_sharp(eta=10.0 / (high - low), k=arena.num_candidates)


def _weak_to_strong(arena: Arena) -> tuple[Guidance, Method]:
    chosen = arena.config.search
    sizes = (chosen.beam_width, chosen.num_successors, chosen.chunk_length)
    return arena.log_ratio(), methods.weak_to_strong(*sizes)


# By what `config.eval.rivals` calls them.
BUILDERS: dict[str, Callable[[Arena], tuple[Guidance, Method]]] = {
    "args": _args,
    "args_sampled": lambda arena: _args(arena, temperature=0.7),
    "blockwise": lambda arena: (arena.first_value(), methods.blockwise(arena.num_candidates)),
    "blockwise_cdq": lambda arena: (arena.expectation(), methods.blockwise(arena.num_candidates)),
    "cards": _cards,
    "controlled_decoding": lambda arena: (
        arena.first_value(),
        methods.controlled_decoding(k=arena.num_candidates),
    ),
    "controlled_decoding_cdq": lambda arena: (
        arena.expectation(),
        methods.controlled_decoding(k=arena.num_candidates),
    ),
    "implicit_best_of_n": lambda arena: (
        arena.log_ratio(),
        methods.implicit_best_of_n(arena.num_candidates),
    ),
    "q_sharp": _q_sharp,
    "value_augmented": lambda arena: (
        arena.first_value(),
        methods.value_augmented(k=arena.num_candidates),
    ),
    "weak_to_strong": _weak_to_strong,
}
