"""Which checkpoint tensors make up which parameter.

The only place that knows both namings. A parameter is assembled from pieces, each a view of
one checkpoint tensor with its axes permuted: nothing is computed, so that reading and
writing are exact inverses, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from iro_jax.models.config import TransformerConfig
from iro_jax.models.families import WeightNames

ParamPath = tuple[str | int, ...]
"""A parameter's place in the tree, as in `("layers", 0, "mlp", "down", "kernel")`."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One checkpoint tensor inside a parameter.

    With `view` the tensor's shape split up, `parameter[slot] == tensor.reshape(view)
    .transpose(order)`.

    Attributes:
      name: the tensor's name in the checkpoint.
      shape: its shape there.
      view: that shape with heads and branches as axes of their own.
      order: permutation of the view's axes.
      slot: index into the parameter; integers and slices.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    order: tuple[int, ...]
    slot: tuple[int | slice, ...]

    def extract(self, parameter: np.ndarray) -> np.ndarray:
        """The checkpoint tensor, from the parameter."""
        part = parameter[self.slot]
        return np.ascontiguousarray(part.transpose(np.argsort(self.order)).reshape(self.shape))


Layout = dict[ParamPath, tuple[Piece, ...]]


def checkpoint_layout(config: TransformerConfig, names: WeightNames) -> Layout:
    """The pieces of every parameter of a network, by the parameter's path."""
    vocab, width = config.vocab_size, config.embed_dim
    layout: Layout = {("embedding",): (_same(names.embedding + ".weight", (vocab, width)),)}
    if config.head == "score":
        layout["score_head",] = (_same(names.score + ".weight", (1, width)),)
    elif not config.tied_embeddings:
        layout["unembedding",] = (_same(names.unembedding + ".weight", (vocab, width)),)
    layout |= _norm(("final_norm",), names.final_norm, width, config.norm)
    for index in range(config.num_layers):
        layout |= _block(config, names, index)
    return layout


def tensor_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Every checkpoint tensor that the layout needs, with its shape."""
    return {piece.name: piece.shape for pieces in layout.values() for piece in pieces}


def _block(config: TransformerConfig, names: WeightNames, index: int) -> Layout:
    place: ParamPath = ("layers", index)
    prefix = names.layer.format(index)
    layout: Layout = {}
    norms = {
        "attention_norm": names.attention_norm,
        "attention_post_norm": names.attention_post_norm,
        "mlp_norm": names.mlp_norm,
        "mlp_post_norm": names.mlp_post_norm,
    }
    for parameter, name in norms.items():
        if name is not None:
            layout |= _norm((*place, parameter), prefix + name, config.embed_dim, config.norm)
    if config.qk_norm:
        for parameter, name in (("query_norm", names.query_norm), ("key_norm", names.key_norm)):
            path = (*place, "attention", parameter)
            layout |= _norm(path, prefix + name, config.head_dim, "rms")

    layout |= _qkv((*place, "attention", "qkv"), config, names, prefix)
    heads = (config.num_kv_heads, config.group_size, config.head_dim)
    output = (*place, "attention", "output")
    layout |= _linear(output, prefix + names.output, heads, config.embed_dim, config.output_bias)
    layout |= _mlp((*place, "mlp"), config, names, prefix)
    return layout


def _qkv(path: ParamPath, config: TransformerConfig, names: WeightNames, prefix: str) -> Layout:
    kv_heads, group, head_dim = config.num_kv_heads, config.group_size, config.head_dim
    if names.qkv is not None:
        if group != 1:
            raise ValueError(
                f"Fused {names.qkv} is only known for one query head a key head. Got: {group}"
            )
        sections: list[tuple[str, tuple[int, ...], int | slice]]
        sections = [(names.qkv, (kv_heads, 3, head_dim), slice(None))]
    else:
        sections = [
            (names.query, (kv_heads, group, head_dim), slice(0, group)),
            (names.key, (kv_heads, head_dim), group),
            (names.value, (kv_heads, head_dim), group + 1),
        ]

    def piece(name: str, view: tuple[int, ...], slot: int | slice, suffix: str) -> Piece:
        rows, axes = math.prod(view), tuple(range(len(view)))
        if suffix == ".bias":
            return Piece(prefix + name + suffix, (rows,), view, axes, (slice(None), slot))
        return Piece(
            name=prefix + name + suffix,
            shape=(rows, config.embed_dim),
            view=(*view, config.embed_dim),
            order=(len(view), *axes),
            slot=(slice(None), slice(None), slot),
        )

    suffixes = {"kernel": ".weight"} | ({"bias": ".bias"} if config.qkv_bias else {})
    return {
        (*path, parameter): tuple(piece(*section, suffix) for section in sections)
        for parameter, suffix in suffixes.items()
    }


def _mlp(path: ParamPath, config: TransformerConfig, names: WeightNames, prefix: str) -> Layout:
    branches = (names.gate, names.up) if config.gated_mlp else (names.up,)
    hidden, width = config.mlp_dim, config.embed_dim
    layout: Layout = {
        (*path, "up", "kernel"): tuple(
            Piece(
                name=f"{prefix}{name}.weight",
                shape=(hidden, width),
                view=(hidden, width),
                order=(1, 0),
                slot=(slice(None), branch),
            )
            for branch, name in enumerate(branches)
        )
    }
    if config.mlp_bias:
        layout[*path, "up", "bias"] = tuple(
            Piece(f"{prefix}{name}.bias", (hidden,), (hidden,), (0,), (branch,))
            for branch, name in enumerate(branches)
        )
    return layout | _linear((*path, "down"), prefix + names.down, (hidden,), width, config.mlp_bias)


def _linear(path: ParamPath, name: str, inputs: tuple[int, ...], width: int, bias: bool) -> Layout:
    view = (width, *inputs)
    kernel = Piece(
        name=name + ".weight",
        shape=(width, math.prod(inputs)),
        view=view,
        order=(*range(1, len(view)), 0),
        slot=(),
    )
    layout: Layout = {(*path, "kernel"): (kernel,)}
    if bias:
        layout[*path, "bias"] = (_same(name + ".bias", (width,)),)
    return layout


def _norm(path: ParamPath, name: str, size: int, kind: str) -> Layout:
    layout: Layout = {(*path, "scale"): (_same(name + ".weight", (size,)),)}
    if kind == "layer":
        layout[*path, "bias"] = (_same(name + ".bias", (size,)),)
    return layout


def _same(name: str, shape: tuple[int, ...]) -> Piece:
    return Piece(name, shape, shape, tuple(range(len(shape))), ())
