"""A value function's training step: `iro_jax.values.fit.update_fn` with the run's objective."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from experiments.plan.experiment import Experiment
from experiments.plan.placing import PyTree, with_shardings
from experiments.plan.programs import Program, compile_program
from iro_jax.models.sharding import TRAINING, named_sharding, tree_shardings
from iro_jax.values.fit import update_fn


@dataclasses.dataclass(frozen=True)
class Update:
    """The training step of a value function, as an abstract call.

    Attributes:
      experiment: what is run.
      mesh: where.
      num_rollouts: of an update; the configured batch if None.
      parts: in which they are computed; the configured ones if None.
    """

    experiment: Experiment
    mesh: Mesh
    num_rollouts: int | None = None
    parts: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rollouts, the rows that they are packed into, and the slots of a row."""
        settings = self.experiment.fitting.fit
        rollouts = self.num_rollouts or settings.batch_size
        longest = self.experiment.prompt_tokens + self.experiment.search.max_new_tokens
        expected = self.experiment.prompt_tokens + self.experiment.answer_tokens
        parts = self.parts or settings.micro_batches
        shares = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows = -(-rollouts * expected // longest // parts)
        return rollouts, parts * (-(-rows // shares) * shares), longest

    @functools.cached_property
    def state(self) -> dict[str, PyTree]:
        """What is trained, the optimiser's state and what is frozen, abstract and placed."""
        objective = self.experiment.objective()
        params = self.experiment.value_params(self.experiment.value)
        trained = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), objective.initial(params)
        )
        # Heads on states that were computed before need no backbone.
        frozen = None if self.experiment.fitting.trainable == "head" else objective.frozen(params)
        state = {
            "params": trained,
            "optimizer": jax.eval_shape(self.optimizer.init, trained),
            "frozen": frozen,
        }
        return with_shardings(state, tree_shardings(state, self.mesh, TRAINING))

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return self.experiment.fitting.fit.optimizer(100)

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A packed batch; see `iro_jax.values.packing`."""
        rollouts, rows, slots = self.sizes
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "prefixes": ((rollouts, slots), jnp.bool_),
            "reward": ((rollouts,), jnp.float32),
            "weight": ((rollouts,), jnp.float32),
        }
        if self.experiment.fitting.trainable == "head":
            width = self.experiment.value.network.config.embed_dim
            shapes["states"] = ((rollouts, slots, width), jnp.float32)
        else:
            shapes |= {
                "first": ((rollouts,), jnp.int32),
                "tokens": ((rows, slots), jnp.int32),
                "mask": ((rows, slots), jnp.bool_),
                "segments": ((rows, slots), jnp.int32),
            }
        return {
            name: jax.ShapeDtypeStruct(
                shape,
                dtype,
                sharding=named_sharding(("batch", *(None,) * (len(shape) - 1)), shape, self.mesh),
            )
            for name, (shape, dtype) in shapes.items()
        }

    def update(self) -> Program:
        parts = self.parts or self.experiment.fitting.fit.micro_batches
        update = update_fn(self.experiment.objective(), self.optimizer, parts)
        state = self.state
        call = (state["params"], state["optimizer"], state["frozen"], self.batch())
        return compile_program("value update", update, call, self.mesh)

    def gradient(self) -> Program:
        """The loss of one part of a batch, and its gradient, alone."""
        state = self.state
        gradient = jax.value_and_grad(self.experiment.objective())
        call = (state["params"], state["frozen"], self.batch())
        return compile_program("gradient", gradient, call, self.mesh)
