"""A transformer as pure functions of `(params, cache, tokens)`.

`Network` is a frozen, hashable description with four functions: `forward` reads whole
sequences and keeps nothing (training, rewards), `prefill` reads prompts into a cache,
`decode` extends every candidate by one or more tokens, and `init` makes random parameters.
None of them is jitted here; the caller jits. Parameters are the NNX state of
`iro_jax.models.transformer.Transformer`.

Layers are unrolled: a cache carried through `lax.scan` would be copied at every step.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Literal, TypeAlias

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from iro_jax.models import rope as rope_lib
from iro_jax.models.attention import SLOT_BLOCK, Part, attend, attend_without_gradient
from iro_jax.models.cache import EMPTY, Cache, CachePart, pack, visible
from iro_jax.models.config import TransformerConfig
from iro_jax.models.lora import Adapters
from iro_jax.models.sharding import RULES, Rules, tree_shardings
from iro_jax.models.transformer import AttendFn, Transformer

if TYPE_CHECKING:
    from kernels import Implementation

Params: TypeAlias = nnx.State
Depth = Literal["hidden"] | int
"""Hidden states: after the final norm, or the residual stream after so many blocks."""
Want = Literal["logits", "score"] | Depth
_NAMED = ("logits", "hidden", "score")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What was asked for; the rest is None. Letters: V vocabulary, D embed_dim.

    Attributes:
      logits: next-token logits, f32, `[..., V]`.
      hidden: hidden states after the final norm, `[..., D]`.
      score: the scalar head's value, f32, `[...]`.
      layers: by number, the residual stream after that many blocks, `[..., D]`; what
        `transformers` calls `hidden_states`, except that its last entry is `hidden` here.
    """

    logits: Float[Array, "*batch V"] | None = None
    hidden: Float[Array, "*batch D"] | None = None
    score: Float[Array, "*batch"] | None = None
    layers: dict[int, Float[Array, "*batch D"]] = dataclasses.field(default_factory=dict)

    def at(self, depth: Depth) -> Float[Array, "*batch D"]:
        """The hidden states that were asked for as `depth`."""
        hidden = self.layers[depth] if isinstance(depth, int) else self.hidden
        assert hidden is not None
        return hidden


@dataclasses.dataclass(frozen=True)
class Network:
    """One architecture. Equal configurations give equal networks (static under `jax.jit`).

    Attributes:
      config: of the architecture.
      kernels: what computes the attention of a decoded token: `xla`, or a Pallas kernel; see
        `kernels.Implementation`. On a mesh of several devices it is always XLA. On one CPU
        device, `xla` stands for the kernels of `kernels/cpu` too, where they fit: there `prefill`
        and `decode` have no derivatives, and `forward` has.
      rules: how its weights and caches are split over a mesh.
    """

    config: TransformerConfig
    kernels: Implementation = "xla"
    rules: Rules = RULES

    def init(self, key: Array) -> Params:
        """Random parameters in f32: normal with deviation 0.02, norms at one."""
        return nnx.state(Transformer(self.config, rngs=nnx.Rngs(params=key)), nnx.Param)

    def abstract_params(self) -> Params:
        """Shapes and axis names of the parameters, without the arrays."""
        return _split(self.config)[1]

    def param_shardings(self, mesh: Mesh, rules: Rules | None = None) -> Params:
        """A `NamedSharding` for every parameter, in the structure of the parameters.

        Args:
          rules: other ones than its own, as for training.
        """
        return tree_shardings(self.abstract_params(), mesh, rules or self.rules)

    def empty_cache(self, **sizes: int) -> Cache:
        """An empty `Cache`; see `Cache.empty` for the sizes."""
        return Cache.empty(self.config, **sizes).pinned(self.rules)

    def forward(
        self,
        params: Params,
        tokens: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"],
        *,
        want: tuple[Want, ...] | None = None,
        adapters: Adapters | None = None,
        segments: Int[Array, "batch length"] | None = None,
        remat: bool = False,
    ) -> Outputs:
        """Reads whole sequences.

        Args:
          tokens: token ids; anything where `mask` is false.
          mask: which tokens are real. Padding may stand on either side.
          want: the outputs: `logits`, `hidden`, `score`, or numbers of layers; by default
            what the configuration's head gives.
          adapters: low-rank changes of the weights; see `iro_jax.models.lora`.
          segments: to which sequence of its row each token belongs, where a row holds several:
            a number of its own for each, side by side. Sequences do not see each other, and the
            positions of each begin at zero.
          remat: whether a gradient computes the layers again instead of remembering what is
            inside them.

        Returns:
          `Outputs` at every token, `[batch, length, ...]`; arbitrary at padding.
        """
        _check_tokens(tokens, mask, rank=2)
        positions = token_positions(mask, jnp.zeros(tokens.shape[:-1], jnp.int32))
        if segments is not None:
            chex.assert_equal_shape([tokens, segments])
            positions = _positions_in_segments(mask, segments)
        module = self._module(params)
        stream, _ = _apply(
            module, tokens, positions, (), None, adapters, segments=segments, remat=remat
        )
        return self._outputs(module, stream, want)

    def prefill(
        self,
        params: Params,
        cache: Cache,
        tokens: Int[Array, "P S"],
        mask: Bool[Array, "P S"],
        *,
        want: tuple[Want, ...] | None = None,
        every_position: bool = False,
        adapters: Adapters | None = None,
    ) -> tuple[Outputs, Cache]:
        """Reads the prompts into an empty cache.

        Args:
          cache: a new cache with `prompt_slots == S`.
          tokens: prompts, one bucket long.
          mask: which tokens are real; each prompt has at least one.
          every_position: outputs at all S tokens, not only at each prompt's last one.
          adapters: as in `forward`.

        Returns:
          `Outputs` of shape `[P, ...]` (or `[P, S, ...]`), and the cache.
        """
        _check_tokens(tokens, mask, rank=2)
        chex.assert_shape(tokens, cache.prompt.positions.shape)
        positions = token_positions(mask, jnp.zeros(tokens.shape[:-1], jnp.int32))
        module = self._module(params)
        stream, prompt = _apply(
            module,
            tokens,
            positions,
            (),
            None,
            adapters,
            attend=attend_without_gradient,
            at=None if every_position else jnp.argmax(positions, axis=-1),
        )
        cache = dataclasses.replace(cache, prompt=prompt.pinned(self.rules))
        return self._outputs(module, stream, want), cache

    def decode(
        self,
        params: Params,
        cache: Cache,
        tokens: Int[Array, "P K B N"],
        mask: Bool[Array, "P K B N"] | None = None,
        *,
        want: tuple[Want, ...] | None = None,
        adapters: Adapters | None = None,
        kept: Int[Array, "P K B"] | None = None,
        at: Int[Array, "P K B"] | None = None,
    ) -> tuple[Outputs, Cache]:
        """Extends every candidate's chunk by N tokens (N = 1 when sampling).

        Args:
          cache: its chunk has room for N more slots (the cursor is traced, so this is the
            caller's arithmetic).
          tokens: the next tokens of every candidate.
          mask: which of them are real; a finished candidate's are not. All by default.
          adapters: as in `forward`.
          kept: how many of its beam's tokens each candidate still has; the tokens of its chunk
            stand in the place of the others. All by default. `Cache.commit` has to be told.
          at: at which of its N tokens each candidate's outputs are wanted. The last layer then
            computes keys and values of the others, and nothing else.

        Returns:
          `Outputs` at every new token, `[P, K, B, N, ...]`, or of shape `[P, K, B, ...]` where
          `at` says, and the cache with all tokens in it.
        """
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        _check_tokens(tokens, mask, rank=4)
        chex.assert_shape(tokens, (*cache.chunk.lengths.shape, None))
        if tokens.shape[-1] > cache.chunk.slots:
            raise ValueError(
                f"The chunk has {cache.chunk.slots} slots. Got: {tokens.shape[-1]} tokens at once"
            )
        beams = cache.beams
        if kept is not None:
            forgotten = kept - beams.lengths[..., None]
            positions = token_positions(mask, cache.next_positions() + forgotten)
        else:
            positions = token_positions(mask, cache.next_positions())
        context = tuple(part for part in (cache.prompt, beams) if part.slots)
        before = None if kept is None else cache.prompt.lengths[:, None, None] + kept
        module = self._module(params)
        stream, chunk = _apply(
            module,
            tokens,
            positions,
            context,
            cache.chunk,
            adapters,
            before,
            attend=attend_without_gradient,
            kernels=self.kernels,
            at=at,
        )
        return self._outputs(module, stream, want), dataclasses.replace(cache, chunk=chunk)

    def truncate(self, params: Params, num_layers: int) -> tuple[Network, Params]:
        """The network of the first blocks alone, for those who want their hidden states."""
        flat = nnx.to_flat_state(params)
        kept = [(path, x) for path, x in flat if path[0] != "layers" or path[1] < num_layers]
        config = self.config.replace(layers=self.config.layers[:num_layers])
        return dataclasses.replace(self, config=config), nnx.from_flat_state(kept)

    def logits(self, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Next-token logits, f32, from `Outputs.hidden`."""
        return self._module(params).logits(hidden)

    def _module(self, params: Params) -> Transformer:
        return nnx.merge(_split(self.config)[0], params)

    def _outputs(
        self, module: Transformer, stream: list[Array], want: tuple[Want, ...] | None
    ) -> Outputs:
        """From the residual stream before, between and after the layers."""
        want = (self.config.head,) if want is None else want
        depths = range(self.config.num_layers + 1)
        layers = [item for item in want if isinstance(item, int)]
        if not want or not all(item in _NAMED or item in depths for item in want):
            raise ValueError(
                f"want must be some of {_NAMED}, or numbers of layers up to"
                f" {self.config.num_layers}. Got: {want}"
            )
        hidden = module.final_norm(stream[-1])
        return Outputs(
            logits=module.logits(hidden) if "logits" in want else None,
            hidden=hidden if "hidden" in want else None,
            score=module.score(hidden) if "score" in want else None,
            layers={depth: stream[depth] for depth in layers},
        )


@functools.lru_cache(maxsize=64)
def _split(config: TransformerConfig) -> tuple[nnx.GraphDef, Params]:
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return nnx.split(abstract)


def _check_tokens(tokens: Array, mask: Array, rank: int) -> None:
    chex.assert_rank(tokens, rank)
    chex.assert_type(tokens, int)
    chex.assert_type(mask, bool)
    chex.assert_equal_shape([tokens, mask])


def token_positions(
    mask: Bool[Array, "*lead N"], start: Int[Array, "*lead"]
) -> Int[Array, "*lead N"]:
    """Positions from `start` on of tokens that are real, and EMPTY of the others."""
    offsets = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
    return jnp.where(mask, start[..., None] + offsets, EMPTY)


def _positions_in_segments(
    mask: Bool[Array, "batch length"], segments: Int[Array, "batch length"]
) -> Int[Array, "batch length"]:
    before = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.where(mask, before - lax.cummax(jnp.where(first, before, 0), axis=1), EMPTY)


def _apply(
    module: Transformer,
    tokens: Int[Array, "*lead N"],
    positions: Int[Array, "*lead N"],
    context: tuple[CachePart, ...],
    own: CachePart | None,
    adapters: Adapters | None = None,
    before: Int[Array, "*lead"] | None = None,
    segments: Int[Array, "*lead N"] | None = None,
    remat: bool = False,
    attend: AttendFn = attend,
    kernels: Implementation = "xla",
    at: Int[Array, "*lead"] | None = None,
) -> tuple[list[Float[Array, "*lead N D"]], CachePart]:
    """Runs new tokens through the layers.

    Args:
      context: parts that are read only; their leading axes are a prefix of `lead`.
      own: the part that the new tokens are written into and that they attend to; None
        makes a new part that holds just these tokens.
      adapters: low-rank changes of the weights.
      before: the positions in `context` that are visible; all by default.
      segments: new tokens see their like alone, without a context.
      remat: layers are computed again for the gradient; the own part stays empty then.
      attend: attends to all parts.
      kernels: what does it for a decoded token, where a kernel can.
      at: the one new token whose residual stream is wanted; all by default.

    Returns:
      The residual stream before, between and after the layers, without N where `at` says, and
      the own part with the new tokens in it.
    """
    config = module.config
    if own is None:
        own_positions = positions
        lengths = jnp.zeros(positions.shape[:-1], jnp.int32)
        cursor = jnp.zeros((), jnp.int32)
    else:
        cursor = own.cursor
        own_positions = lax.dynamic_update_slice_in_dim(own.positions, positions, cursor, axis=-1)
        lengths = own.lengths

    # Each kind once, in the layers' order: the program must be the same in every process.
    ropes = dict.fromkeys(layer.rope for layer in config.layers)
    windows = dict.fromkeys(layer.window for layer in config.layers)
    rope_tables = {rope: rope_lib.tables(rope, positions) for rope in ropes}
    masks = {
        window: [visible(positions, part.positions, window, before) for part in context]
        + [visible(positions, own_positions, window)]
        for window in windows
    }
    if segments is not None:
        together = segments[..., :, None] == segments[..., None, :]
        masks = {window: [seen & together for seen in parts] for window, parts in masks.items()}

    # A short prompt fills its slots at once.
    used_slots = [
        None if part.lengths.ndim == 1 and part.slots <= SLOT_BLOCK else jnp.max(part.cursor)
        for part in context
    ]

    # A kernel takes one token of each candidate behind both other parts, on one device.
    one_device = jax.sharding.get_abstract_mesh().size <= 1
    by_kernel = kernels != "xla" and one_device and len(context) == 2 and before is None
    places = [*(part.positions for part in context), own_positions]

    def attend_by_kernel(window, queries, parts, softcap):
        from kernels import Part as KernelPart  # Pallas takes a second to import
        from kernels import prefix_attention

        prompt, beams, chunk = (
            KernelPart(x.keys, x.values, place) for x, place in zip(parts, places, strict=True)
        )
        found = prefix_attention(
            queries[..., 0, :, :, :],
            positions[..., 0],
            prompt,
            beams,
            chunk,
            jnp.max(context[1].cursor),
            window=window,
            softcap=softcap,
            implementation=kernels,
        )
        return found[..., None, :, :, :]

    new_keys: list[Array] = []
    new_values: list[Array] = []

    def write(stored, new):
        return lax.dynamic_update_slice_in_dim(stored, pack(new), cursor, axis=-2)

    def remember(index, window, keys, values):
        if remat:
            pass  # what a recomputed layer stores could not leave it
        elif own is None:
            new_keys.append(pack(keys))
            new_values.append(pack(values))
        else:
            new_keys.append(write(own.keys[index], keys))
            new_values.append(write(own.values[index], values))
            keys, values = own.unpack(new_keys[-1]), own.unpack(new_values[-1])
        *seen, seen_own = masks[window]
        if index == last_with_choice:
            *seen, seen_own = map(chosen, masks[window])
        stored = [
            Part(part.unpack(part.keys[index]), part.unpack(part.values[index]), mask, used)
            for part, mask, used in zip(context, seen, used_slots, strict=True)
        ]
        return [*stored, Part(keys, values, seen_own)]

    # Only keys and values of the others are needed of the last layer.
    last_with_choice = None if at is None else config.num_layers - 1

    def chosen(x: Array) -> Array:
        assert at is not None
        return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - at.ndim)), at.ndim)

    stream = [module.embed(tokens)]
    for index, block in enumerate(module.layers):
        layer = block.layer
        apply = functools.partial(
            block,
            rope_tables=rope_tables[layer.rope],
            remember=functools.partial(remember, index, layer.window),
            adapters={} if adapters is None else adapters[index],
            attend=functools.partial(attend_by_kernel, layer.window)
            if by_kernel and tokens.shape[-1] == 1
            else attend,
            choose=chosen if index == last_with_choice else None,
        )
        stream.append((jax.checkpoint(apply) if remat else apply)(stream[-1]))

    written = CachePart(
        keys=tuple(new_keys),
        values=tuple(new_values),
        positions=own_positions,
        lengths=lengths + jnp.sum(positions != EMPTY, axis=-1, dtype=jnp.int32),
        cursor=cursor + tokens.shape[-1],
    )
    if at is not None:
        stream = [jnp.squeeze(x, at.ndim) for x in (*map(chosen, stream[:-1]), stream[-1])]
    return stream, written
