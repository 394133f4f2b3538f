"""Parameters assembled on the devices that hold them, from parts of checkpoint tensors.

Each distinct shard of a parameter is put together once on the host, reading no more of the
tensors than lies within it and no more than a small block at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Sharding

from iro_jax.models.weights.checkpoint import Checkpoint
from iro_jax.models.weights.layout import Piece

_BLOCK_BYTES = 64 * 2**20

Bounds = tuple[tuple[int, int], ...]
"""First and last-plus-one index of a shard along each axis of its parameter."""


def load_parameter(
    checkpoint: Checkpoint,
    pieces: tuple[Piece, ...],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    empty: Callable[[list[int], np.dtype], np.ndarray] = np.empty,
) -> jax.Array:
    """Reads each distinct shard once, into an `empty` array, and puts it on its devices."""
    shards: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(
            (part.start or 0, size if part.stop is None else part.stop)
            for part, size in zip(index, shape, strict=True)
        )
        shards.setdefault(bounds, []).append(device)
    arrays: list[jax.Array] = []
    for bounds, devices in shards.items():
        block = empty([stop - start for start, stop in bounds], dtype)
        for piece in pieces:
            _read_piece(checkpoint, piece, bounds, block)
        arrays += [jax.device_put(block, device) for device in devices]
        jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_piece(checkpoint: Checkpoint, piece: Piece, bounds: Bounds, out: np.ndarray) -> None:
    """Copies the part of a tensor that lies within a parameter's `bounds` into `out`."""
    kept = [axis for axis in range(out.ndim) if not _is_integer(piece.slot, axis)]
    target = out[piece.slot]
    view_bounds = [(0, size) for size in piece.view]
    for parameter_axis, view_axis in zip(kept, piece.order, strict=True):
        if not _is_section(piece.slot, parameter_axis):
            view_bounds[view_axis] = bounds[parameter_axis]

    leading = piece.view[0]
    rows_each = piece.shape[0] // leading
    row_bytes = max(1, int(np.prod(piece.shape[1:])) * rows_each * 4)
    step = max(1, _BLOCK_BYTES // row_bytes)
    start, stop = view_bounds[0]
    leading_axis = piece.order.index(0)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        rows = slice(first * rows_each, last * rows_each)
        # Only the first axis of the view is cut while reading rows; the others below.
        columns, inner = _columns(piece, view_bounds)
        tensor = checkpoint.read(piece.name, (rows, *columns))
        part = tensor.reshape(last - first, *inner).transpose(piece.order)
        place = [slice(None)] * part.ndim
        place[leading_axis] = slice(first - start, last - start)
        target[tuple(place)] = part


def _columns(
    piece: Piece, view_bounds: list[tuple[int, int]]
) -> tuple[tuple[slice, ...], list[int]]:
    """Column slices of the tensor, and the sizes of the view's axes after the first."""
    inner = [stop - start for start, stop in view_bounds[1:]]
    if len(piece.shape) == 1:
        return (), inner
    # The axes of the view that make up the tensor's columns are the trailing ones.
    split = len(piece.view)
    size = 1
    while size < piece.shape[1]:
        split -= 1
        size *= piece.view[split]
    stride = piece.shape[1] // piece.view[split]
    start, stop = view_bounds[split]
    return (slice(start * stride, stop * stride),), inner


def _is_integer(slot: tuple[int | slice, ...], axis: int) -> bool:
    return axis < len(slot) and isinstance(slot[axis], int)


def _is_section(slot: tuple[int | slice, ...], axis: int) -> bool:
    return axis < len(slot) and slot[axis] != slice(None)
