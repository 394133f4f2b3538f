"""Fitting: one trainer for every loss and every way a value function can have weights.

`fit` knows nothing of value functions. It minimises an objective, a function of trainable
parameters and a batch, with AdamW, a cosine schedule with warm-up, gradient accumulation and
clipping; measures it on held-out examples after every epoch and keeps the best parameters;
stops early; and checkpoints with Orbax, so that a killed fit goes on where it was, with the
batches that it would have seen. The objectives are in `iro_jax.values.objectives`; how batches can
be laid out for them is in `iro_jax.values.packing`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from iro_jax.data import batches
from iro_jax.models.throughput import Throughput, Work, peak
from iro_jax.values.placement import Placement, home, keep_placed

PyTree: TypeAlias = Any
Batch: TypeAlias = Mapping[str, Array]
Example: TypeAlias = dict[str, np.ndarray]
Stacked: TypeAlias = dict[str, np.ndarray]
"""A batch as it comes: examples along a new first axis."""


class Objective(Protocol):
    """Mean loss over the rollouts of a batch, each counted by its `weight`."""

    def __call__(self, trainable: PyTree, frozen: PyTree, batch: Batch) -> Float[Array, ""]: ...


class FitError(RuntimeError):
    """A fit that cannot go on; what was stored before is as it was."""


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How an objective is minimised.

    Attributes:
      learning_rate: the schedule's peak.
      batch_size: rollouts an update.
      num_epochs: at most so many passes over the training rollouts.
      micro_batches: parts that a batch is computed in, one after the other.
      warmup: share of the updates with a rising learning rate; a cosine to zero follows.
      weight_decay, epsilon, b1, b2: of AdamW.
      clip_norm: longest gradient.
      patience: epochs without a better held-out loss before the fit stops with the best weights;
        None goes through all epochs and keeps the last ones, for sets whose held-out part is too
        small to tell epochs apart.
      seed: of the batches' order.
    """

    learning_rate: float = 3e-6
    batch_size: int = 256
    num_epochs: int = 10
    micro_batches: int = 1
    warmup: float = 0.03
    weight_decay: float = 0.0
    epsilon: float = 1e-5
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 1.0
    patience: int | None = 3
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "num_epochs", "micro_batches", "patience"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1. Got: {number}")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                "micro_batches must divide batch_size."
                f" Got: {self.micro_batches} and {self.batch_size}"
            )
        for name in ("learning_rate", "epsilon", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number. Got: {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1). Got: {self.warmup}")

    def optimizer(self, num_updates: int) -> optax.GradientTransformation:
        warmup_steps = min(math.ceil(self.warmup * num_updates), num_updates - 1)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0 if warmup_steps else self.learning_rate,
            self.learning_rate,
            warmup_steps,
            max(num_updates, 1),
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(schedule, self.b1, self.b2, self.epsilon, weight_decay=self.weight_decay),
        )


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One line of a fit's curve: losses are means over rollouts.

    Epoch 0 is before the first update; both of its losses are the held-out one.

    Attributes:
      throughput: of the updates, but for those that may have compiled; None where nothing was
        measured. It is not stored.
    """

    epoch: int
    updates: int
    train_loss: float
    held_out_loss: float
    throughput: Throughput | None = dataclasses.field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        """What is the same whenever a fit is repeated."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a fit found.

    Attributes:
      params: the trainable parameters with the lowest held-out loss, or the last ones; see
        `FitSettings.patience`.
      curve: epoch by epoch; epoch 0 is before the first update.
      best_epoch: the one that `params` are from.
    """

    params: PyTree
    curve: tuple[Epoch, ...]
    best_epoch: int


def fit(
    objective: Objective,
    params: PyTree,
    frozen: PyTree,
    train: Sequence[Example],
    held_out: Sequence[Example],
    settings: FitSettings,
    *,
    folder: Path,
    progress: bool = False,
    desc: str = "Fitting",
    on_epoch: Callable[[Epoch], None] | None = None,
    arrange: Callable[[Stacked], Stacked] | None = None,
    count: Callable[[Stacked], Work] | None = None,
    mesh: Mesh | None = None,
) -> Fitted:
    """Minimises an objective.

    Args:
      params: trainable parameters to start from; kept in f32.
      frozen: what else the objective needs; an argument of its compiled program.
      train, held_out: examples, all with the same arrays of the same shapes.
      folder: of the checkpoints, one an epoch. A fit that was killed goes on from there; one
        that has ended is only read.
      progress: whether to show a bar.
      on_epoch: is told every line of the curve, also those of before a restart.
      arrange: lays every batch out for the objective, in one shape; a function of the batch alone.
      count: what an update with such a batch computes; the bar and the curve then say how fast.
      mesh: whose devices, those of all hosts, share the work: batches are spread over `data` and
        `fsdp`, parameters and what belongs to them over `fsdp` and `model`. Every host calls with
        the same arguments. A checkpoint can be restored onto another mesh.

    Raises:
      FitError: a loss or gradient is not finite, or a checkpoint cannot be written, as on a full
        disk; the checkpoints before stay where they are.
      ValueError: there are no examples.
    """
    if not train or not held_out:
        raise ValueError(
            f"A fit needs training and held-out examples. Got: {len(train)} and {len(held_out)}"
        )
    per_epoch = _updates_per_epoch(train, settings)
    optimizer = settings.optimizer(per_epoch * settings.num_epochs)
    homes = jax.tree.map(home, params)
    # Copies: updates consume what they are given.
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    places = Placement(mesh)
    params, frozen = places.put(params), places.put(frozen)
    state = {
        "params": params,
        "optimizer": places.init(optimizer.init, params),
        "best": jax.tree.map(jnp.copy, params),
    }
    update = update_fn(objective, optimizer, settings.micro_batches)
    evaluate = _evaluation(objective, settings.micro_batches)

    def laid_out(batch: Stacked) -> Stacked:
        return batch if arrange is None else arrange(batch)

    def held_out_loss(params: PyTree, updates: int) -> float:
        loss = _held_out_loss(
            lambda batch: evaluate(params, frozen, places.spread(laid_out(batch))),
            held_out,
            settings.batch_size,
        )
        if not math.isfinite(loss):
            raise _diverged(updates, folder, f"held-out loss={loss}")
        return loss

    stream = _training_batches(train, settings)
    with places.active(), _checkpoints(folder) as manager:
        curve, stream_state, state = _restore(manager, state)
        if curve:
            stream.set_state(stream_state)
        else:
            start = held_out_loss(state["params"], 0)
            curve = [Epoch(0, 0, start, start)]
        for line in curve:
            _tell(on_epoch, line)
        bar = tqdm(
            total=per_epoch * settings.num_epochs,
            initial=curve[-1].updates,
            unit="update",
            desc=desc,
            disable=not progress,
        )
        compiled = False
        while not _ended(curve, settings):
            losses: list[float] = []
            work, seconds = Work(), 0.0
            for _ in range(per_epoch):
                begin = time.perf_counter()
                batch = laid_out(next(stream))
                state["params"], state["optimizer"], loss, norm = update(
                    state["params"], state["optimizer"], frozen, places.spread(batch)
                )
                losses.append(_finite(loss, norm, curve[-1].updates + len(losses) + 1, folder))
                if compiled and count is not None:
                    work += count(batch)
                    seconds += time.perf_counter() - begin
                compiled = True
                bar.update()
            updates = curve[-1].updates + per_epoch
            line = Epoch(
                epoch=curve[-1].epoch + 1,
                updates=updates,
                train_loss=float(np.mean(losses)),
                held_out_loss=held_out_loss(state["params"], updates),
                throughput=Throughput(work, seconds, peak()) if work.slots else None,
            )
            if line.held_out_loss < min(e.held_out_loss for e in curve):
                state["best"] = jax.tree.map(jnp.copy, state["params"])
            curve.append(line)
            bar.set_postfix_str(_described(line))
            _save(manager, curve, stream.get_state(), state)
            _tell(on_epoch, line)
        bar.close()
    if progress and curve[-1].throughput is not None:
        tqdm.write(f"{desc}: {curve[-1].throughput}; peak: {curve[-1].throughput.peak}")
    last = settings.patience is None
    found = places.fetch(state["params" if last else "best"], homes)
    return Fitted(found, tuple(curve), curve[-1].epoch if last else _best(curve).epoch)


def planned_batches(
    train: Sequence[Example], held_out: Sequence[Example], settings: FitSettings
) -> Iterator[Stacked]:
    """All batches of a fit: those to train on if no epoch is left out, and the held-out ones."""
    updates = _updates_per_epoch(train, settings) * settings.num_epochs
    yield from itertools.islice(_training_batches(train, settings), updates)
    yield from _in_order(held_out, settings.batch_size)


def _updates_per_epoch(train: Sequence[Example], settings: FitSettings) -> int:
    return max(len(train) // settings.batch_size, 1)


def _training_batches(train: Sequence[Example], settings: FitSettings):
    return batches(train, batch_size=settings.batch_size, num_epochs=None, seed=settings.seed)


def update_fn(objective: Objective, optimizer: optax.GradientTransformation, parts: int):
    """A compiled update that takes its batch in `parts`, weighted by what they hold.

    The parameters and the optimizer's state are consumed: the new ones take their place, and lie
    where they lay.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, frozen, batch):
        def of_part(part):
            return jax.value_and_grad(objective)(params, frozen, part)

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        loss, gradient = _mean_over_parts(of_part, zero, batch, parts)
        changes, new = optimizer.update(gradient, state, params)
        new = keep_placed(new)
        params = keep_placed(optax.apply_updates(params, changes))
        return params, new, loss, optax.global_norm(gradient)

    return update


def _evaluation(objective: Objective, parts: int):
    @jax.jit
    def evaluate(params, frozen, batch):
        def of_part(part):
            return objective(params, frozen, part)

        return _mean_over_parts(of_part, jnp.float32(0), batch, parts)

    return evaluate


def _mean_over_parts(
    function: Callable[[Batch], PyTree], zero: PyTree, batch: Batch, parts: int
) -> PyTree:
    """What a function gives for each of a batch's parts, one after the other, by their weights."""
    split = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)
    total = jnp.sum(batch["weight"])

    def add(sums, part):
        share = jnp.sum(part["weight"]) / total
        # The mean of filler alone may be anything.
        return jax.tree.map(
            lambda s, x: s + jnp.where(share == 0, 0, share * x), sums, function(part)
        ), None

    return jax.lax.scan(add, zero, split)[0]


def _held_out_loss(
    evaluate: Callable[[Stacked], Array], examples: Sequence[Example], size: int
) -> float:
    total = weight = 0.0
    for batch in _in_order(examples, size):
        share = float(batch["weight"].sum())
        total += share * float(evaluate(batch))
        weight += share
    return total / weight


def _in_order(examples: Sequence[Example], size: int) -> Iterator[Stacked]:
    """Batches of one size; what fills the last one up weighs nothing."""
    for start in range(0, len(examples), size):
        chosen = list(examples[start : start + size])
        filler = chosen[0] | {"weight": np.zeros((), np.float32)}
        chosen += [filler] * (size - len(chosen))
        yield {name: np.stack([example[name] for example in chosen]) for name in chosen[0]}


def _finite(loss: Array, norm: Array, updates: int, folder: Path) -> float:
    loss_value, norm_value = float(loss), float(norm)
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise _diverged(updates, folder, f"loss={loss_value}, gradient norm={norm_value}")
    return loss_value


def _diverged(updates: int, folder: Path, got: str) -> FitError:
    return FitError(
        f"Update {updates}: the loss and its gradient must be finite; try a lower learning"
        f" rate, or look at the rewards. Checkpoints are in {folder}. Got: {got}"
    )


def _best(curve: Sequence[Epoch]) -> Epoch:
    return min(curve, key=lambda line: line.held_out_loss)


def _ended(curve: Sequence[Epoch], settings: FitSettings) -> bool:
    last = curve[-1].epoch
    waited = last - _best(curve).epoch
    return last >= settings.num_epochs or (
        settings.patience is not None and waited >= settings.patience
    )


def _described(line: Epoch) -> str:
    losses = f"loss={line.train_loss:.4g}, held_out={line.held_out_loss:.4g}"
    return losses if line.throughput is None else f"{losses}, {line.throughput}"


def _tell(on_epoch: Callable[[Epoch], None] | None, line: Epoch) -> None:
    if on_epoch is not None:
        on_epoch(line)


@contextlib.contextmanager
def _checkpoints(folder: Path) -> Iterator[ocp.CheckpointManager]:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    manager = ocp.CheckpointManager(folder.absolute(), options=options)
    try:
        yield manager
    finally:
        with _writing(manager):
            manager.close()


def _save(
    manager: ocp.CheckpointManager, curve: Sequence[Epoch], stream_state: Any, state: PyTree
) -> None:
    progress = {"curve": [line.to_json() for line in curve], "stream": stream_state}
    with _writing(manager):
        manager.save(
            curve[-1].epoch,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
            ),
        )


@contextlib.contextmanager
def _writing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Checkpoints are written behind our back: what went wrong comes out at the next call."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition(" [tensorstore_spec")[0]
        raise FitError(
            f"{manager.directory}: a checkpoint could not be written; those before it are as they"
            f" were, and the same call continues from the last. Got: {reason}"
        ) from error


def _restore(manager: ocp.CheckpointManager, state: PyTree) -> tuple[list[Epoch], Any, PyTree]:
    latest = manager.latest_step()
    if latest is None:
        return [], None, state
    restored = manager.restore(
        latest,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state)),
            progress=ocp.args.JsonRestore(),
        ),
    )
    progress = restored["progress"]
    return [Epoch(**line) for line in progress["curve"]], progress["stream"], restored["state"]
