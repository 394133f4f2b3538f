"""Packing: several rollouts in a row of a batch, instead of a row of padding for each.

A batch stays what it was, the same rollouts with the same weights; only what networks read is laid
out anew, by a pure function of the batch. Each row gets the longest rollouts that still fit
(first-fit decreasing):

    tokens      a a a a a a b b        8 slots, 4 rollouts, 2 rows instead of 4
    segments    1 1 1 1 1 1 2 2
    tokens      c c c c d d d .
    segments    3 3 3 3 4 4 4 0        0 is padding
    first       0 6 8 12

The order of a fit's batches follows from its seed. So all of them are looked at beforehand, and
the number of rows is what the fullest needs: one program serves the whole fit.

`grain.experimental.FirstFitPackIterDataset` packs a stream, and ends a batch where a rollout does
not fit any more; here an update has the number of rollouts that was asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from iro_jax.models import TransformerConfig
from iro_jax.models.flops import forward_flops
from iro_jax.models.sharding import num_shards
from iro_jax.values.fit import Example, FitSettings, Stacked, planned_batches

_READ = ("tokens", "states", "next_states", "next_probabilities")
"""What networks read: arrays with an axis of places behind that of rollouts."""

_STRETCHES = (1, 1.25, 1.5, 2, 3, 4)
"""Lengths of rows to choose from, in longest rollouts; rounded up to multiples of `_STEP`."""

_STEP = 64


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the batches of a fit are laid out.

    Attributes:
      rows: of each part of a batch.
      slots: of a row.
      parts: in which a batch is computed, `FitSettings.micro_batches`; each is packed by itself.
    """

    rows: int
    slots: int
    parts: int = 1

    def __call__(self, batch: Stacked) -> Stacked:
        """The batch with rows of several rollouts each; see `iro_jax.values.objectives`.

        Rollouts of weight zero are left out. Beside what the objective needs, the packed batch
        has the `lengths` of its rollouts, `[n]`, and a `mask`, `[parts * rows, slots]`.

        Raises:
          ValueError: they do not fit.
        """
        lengths = _lengths(batch)
        of_parts = lengths.reshape(self.parts, -1)
        first = np.stack([self._places(of_part) for of_part in of_parts])
        begin = first + self.rows * self.slots * np.arange(self.parts)[:, None]
        packed = {name: np.asarray(x) for name, x in batch.items() if name not in (*_READ, "mask")}
        packed |= {"first": first.reshape(-1).astype(np.int32), "lengths": lengths}
        real = np.arange(batch["prefixes"].shape[1]) < lengths[:, None]
        target = (begin.reshape(-1, 1) + np.arange(real.shape[1]))[real]

        def lay_out(x: np.ndarray) -> np.ndarray:
            rows = np.zeros((self.parts * self.rows * self.slots, *x.shape[2:]), x.dtype)
            rows[target] = x[real]
            return rows.reshape(self.parts * self.rows, self.slots, *x.shape[2:])

        packed |= {name: lay_out(np.asarray(batch[name])) for name in _READ if name in batch}
        numbers = np.broadcast_to(
            np.arange(1, len(lengths) + 1, dtype=np.int32)[:, None], real.shape
        )
        segments = lay_out(numbers)
        return packed | {"segments": segments, "mask": segments > 0}

    def _places(self, lengths: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        first, rows = _first_fit(lengths, self.slots)
        if rows > self.rows:
            raise ValueError(
                f"A part must fit into {self.rows} rows of {self.slots} slots. Got: {rows} rows"
            )
        return first


def packing_for(
    config: TransformerConfig,
    train: Sequence[Example],
    held_out: Sequence[Example],
    settings: FitSettings,
) -> Packing:
    """The packing that costs least of those that serve all batches of a fit.

    Longer rows fill better, and cost more in attention, which computes scores between rollouts
    too. On a mesh (`jax.set_mesh`) the devices can share the rows. A head reads every hidden state
    by itself, so that these need but one row.

    Args:
      config: of the backbone.
      train, held_out: `token_examples` or `state_examples`.
      settings: of the fit.
    """
    parts = list(_parts(train, held_out, settings))
    if "states" in train[0]:
        return Packing(1, max(int(part.sum()) for part in parts), settings.micro_batches)
    longest = max(int(part.max()) for part in parts)
    share = num_shards("batch", jax.sharding.get_abstract_mesh())

    def of_slots(slots: int) -> Packing:
        rows = max(_first_fit(part, slots)[1] for part in parts)
        return Packing(-(-rows // share) * share, slots, settings.micro_batches)

    stretched = dict.fromkeys(math.ceil(x * longest / _STEP) * _STEP for x in _STRETCHES)
    return min(
        map(of_slots, stretched),
        key=lambda packing: packing.rows * forward_flops(config, packing.slots),
    )


def _parts(
    train: Sequence[Example], held_out: Sequence[Example], settings: FitSettings
) -> Iterator[Int[np.ndarray, " n"]]:
    """The lengths of the rollouts in every part of every batch of a fit."""

    def sizes(examples: Sequence[Example]) -> list[Example]:
        return [
            {"lengths": _marked(x).sum(dtype=np.int32), "weight": x["weight"]} for x in examples
        ]

    for batch in planned_batches(sizes(train), sizes(held_out), settings):
        yield from _counted(batch["lengths"], batch["weight"]).reshape(settings.micro_batches, -1)


def _lengths(batch: Stacked) -> Int[np.ndarray, " n"]:
    lengths = np.asarray(_marked(batch)).sum(axis=1, dtype=np.int32)
    return _counted(lengths, np.asarray(batch["weight"]))


def _counted(lengths: np.ndarray, weight: np.ndarray) -> Int[np.ndarray, " n"]:
    return np.where(weight != 0, lengths, 0)


def _marked(arrays: Stacked | Example) -> Bool[np.ndarray, "*n length"]:
    """Which places a network reads: all tokens, or the hidden states at prefixes."""
    return np.asarray(arrays["mask" if "mask" in arrays else "prefixes"])


def _first_fit(lengths: Int[np.ndarray, " n"], slots: int) -> tuple[Int[np.ndarray, " n"], int]:
    """First-fit decreasing: where each sequence begins, row after row, and how many rows it takes.

    Empty ones begin at zero and take nothing.
    """
    used = np.zeros(len(lengths), np.int64)
    first = np.zeros(len(lengths), np.int64)
    for index in np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]:
        row = int(np.argmax(used + lengths[index] <= slots))
        first[index] = row * slots + used[row]
        used[row] += lengths[index]
    return first, max(int(np.count_nonzero(used)), 1)
