"""Temperature, top-k, top-p and the Gumbel-max draw in one kernel, without a sort.

The warpers keep the tokens whose more likely predecessors weigh less than a limit: each token
weighs 1 and the limit is k, or it weighs its probability and the limit is top_p. Floats are
ordered like integers made of their bits, so the weight above a threshold, asked for a few
thresholds at a time, leads to the last integer that still has too much above it: digit by
digit, in 32 bits. Only sums and maxima run over the vocabulary. They can be taken over the
shards of a mesh axis, and then no device holds all logits.

Noise belongs to a key and a token id: the draw is that of `iro_jax.models.sampling.draw`, up to
the rounding of sums, wherever the logits lie.

The algorithm is written once, over a `_Vocabulary`: named arrays, one number a token, that can
be computed elementwise and reduced. It is held as arrays (XLA), as a tile in a TPU's VMEM, or as
a row in a GPU's memory.

Letters: R rows, V vocabulary size (of a shard, where there are shards), n thresholds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, UInt32

from kernels.dispatch import Implementation, dispatch, result_like

_SMALLEST = -(2**31)

_LANES = 128
_TPU_ROWS = 8
_TPU_CHUNK = 2048
_GPU_CHUNK = 2048

# One threshold at a time costs the least arithmetic; shards ask for 15, to talk less often.
_BITS_ALONE = 1
_BITS_SHARDED = 4

_Column = Float[Array, "R 1"]
_Keys = tuple[UInt32[Array, "R 1"], UInt32[Array, "R 1"]]
_Elementwise = Callable[..., Array]


class Drawn(NamedTuple):
    """Drawn tokens and their log-probabilities, `[R]`.

    Attributes:
      tokens: token ids, of the whole vocabulary.
      log_probs: under the policy itself, before the warpers (temperature 1).
      warped_log_probs: under the distribution that was drawn from; 0 when greedy.
    """

    tokens: Int[Array, " R"]
    log_probs: Float[Array, " R"]
    warped_log_probs: Float[Array, " R"]


class _Warpers(NamedTuple):
    temperature: float
    top_k: int | None
    top_p: float


def fused_draw(
    key_data: UInt32[Array, "R 2"],
    logits: Float[Array, "R V"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    axis_name: str | None = None,
    implementation: Implementation = "auto",
) -> Drawn:
    """Draws one token per row; the warpers mean what they do in `iro_jax.models.Sampling`.

    Args:
      key_data: `jax.random.key_data` of one threefry key per row.
      logits: of the policy, f32, without NaN.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keeps the k most likely tokens (ties towards the lower id); None keeps all.
      top_p: then keeps the most likely tokens whose predecessors' mass is below top_p.
      axis_name: inside `jax.shard_map`, the mesh axis that the vocabulary is split over:
        device i of it holds ids `[i * V, (i + 1) * V)`. All of them get the same draw.
      implementation: see `kernels.Implementation`. On GPU, shards are drawn by XLA.

    Raises:
      ValueError: shapes, types or warpers are not as described.
    """
    _check(key_data, logits, temperature, top_k, top_p)
    warpers = _Warpers(temperature, top_k, top_p)
    if axis_name is None:
        xla = functools.partial(reference, warpers=warpers)
        tpu, gpu = (
            functools.partial(kernel, warpers=warpers) for kernel in (tpu_kernel, gpu_kernel)
        )
        interpret = functools.partial(tpu, interpret=True)
    else:
        xla = gpu = functools.partial(reference, warpers=warpers, axis_name=axis_name)
        tpu = functools.partial(sharded_tpu_kernel, warpers=warpers, axis_name=axis_name)
        interpret = functools.partial(tpu, interpret=True)
    return dispatch(
        implementation, key_data, logits, xla=xla, tpu=tpu, gpu=gpu, interpret=interpret
    )


def reference(
    key_data: UInt32[Array, "R 2"],
    logits: Float[Array, "R V"],
    warpers: _Warpers,
    axis_name: str | None = None,
) -> Drawn:
    """`fused_draw` in plain XLA."""
    return _drawn(_draw(_Arrays(logits, axis_name), _words(key_data), warpers))


def sharded_tpu_kernel(
    key_data: UInt32[Array, "R 2"],
    logits: Float[Array, "R V"],
    warpers: _Warpers,
    axis_name: str,
    interpret: bool = False,
) -> Drawn:
    """`fused_draw` over shards, whose weights above thresholds a Mosaic kernel sums.

    The rest is a handful of elementwise expressions and reductions, which XLA fuses as well.
    """
    return _drawn(_draw(_ArraysOnTpu(logits, axis_name, interpret), _words(key_data), warpers))


def tpu_kernel(
    key_data: UInt32[Array, "R 2"],
    logits: Float[Array, "R V"],
    warpers: _Warpers,
    interpret: bool = False,
) -> Drawn:
    """`fused_draw` in one Mosaic launch; eight rows at a time stay in VMEM throughout."""
    rows, size = logits.shape
    padded = _round_up(size, min(_TPU_CHUNK, _round_up(size, _LANES)))
    scratch = pltpu.VMEM((_TPU_ROWS, padded), jnp.float32)
    tile_bytes = 4 * _TPU_ROWS * padded

    def body(
        high_ref, low_ref, logits_ref, token_ref, log_prob_ref, warped_ref, scaled_ref, other_ref
    ):
        vocabulary = _Tile(_registers(logits_ref, scaled_ref, other_ref), size)
        drawn = _draw(vocabulary, (high_ref[...], low_ref[...]), warpers)
        token_ref[...], log_prob_ref[...], warped_ref[...] = drawn

    column = pl.BlockSpec((_TPU_ROWS, 1), lambda i: (i, 0))
    return _drawn(
        pl.pallas_call(
            body,
            grid=(pl.cdiv(rows, _TPU_ROWS),),
            in_specs=[
                column,
                column,
                pl.BlockSpec((_TPU_ROWS, padded), lambda i: (i, 0), pipeline_mode=pl.Buffered(1)),
            ],
            out_specs=[column] * 3,
            out_shape=_columns(logits),
            scratch_shapes=[scratch, scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), vmem_limit_bytes=3 * tile_bytes + 2**22
            ),
            interpret=interpret,
            name="fused_draw",
        )(*_words(key_data), logits)
    )


def gpu_kernel(
    key_data: UInt32[Array, "R 2"],
    logits: Float[Array, "R V"],
    warpers: _Warpers,
    interpret: bool = False,
) -> Drawn:
    """`fused_draw` in one Triton launch, a program per row."""
    rows, size = logits.shape
    padded = _round_up(size, min(_GPU_CHUNK, pl.next_power_of_2(size)))

    def body(
        high_ref, low_ref, logits_ref, token_ref, log_prob_ref, warped_ref, scaled_ref, other_ref
    ):
        vocabulary = _Row(_registers(logits_ref, scaled_ref, other_ref), size, interpret)
        drawn = _draw(vocabulary, (high_ref[...], low_ref[...]), warpers)
        token_ref[...], log_prob_ref[...], warped_ref[...] = drawn

    column = pl.BlockSpec((1, 1), lambda i: (i, 0))
    row = pl.BlockSpec((1, padded), lambda i: (i, 0))
    # Triton has no scratch of this size, so the buffers are results that nobody reads.
    buffer = result_like(logits, (rows, padded))
    *drawn, _, _ = pl.pallas_call(
        body,
        grid=(rows,),
        in_specs=[column, column, row],
        out_specs=[column, column, column, row, row],
        out_shape=[*_columns(logits), buffer, buffer],
        compiler_params=plgpu.CompilerParams(num_warps=8),
        interpret=interpret,
        name="fused_draw",
    )(*_words(key_data), logits)
    return _drawn(drawn)


class _Vocabulary:
    """Named arrays of one number per row and token. "logits" is given.

    Functions of tokens are called as `fn(ids, *values)`, `ids` `[1, m]` and the values of
    `sources` `[R, m]`, for some m tokens at a time; they may use columns `[R, 1]`.

    Attributes:
      rows: R.
      size: number of tokens, those of all shards.
      bits: how many bits of a threshold are found at once.
    """

    rows: int
    size: int
    bits: int

    def assign(self, name: str, fn: _Elementwise, *sources: str) -> None:
        raise NotImplementedError

    def total(self, fn: _Elementwise, *sources: str) -> _Column:
        raise NotImplementedError

    def largest(self, fn: _Elementwise, *sources: str) -> _Column:
        raise NotImplementedError

    def weight_from(
        self, thresholds: list[Int[Array, "R 1"]], order: str, weight: str | None
    ) -> list[_Column]:
        """For each threshold: what tokens weigh whose `order` is not below it; 1 each by default.

        Thresholds are integers in the sense of `_ordinal`.
        """
        raise NotImplementedError


class _Arrays(_Vocabulary):
    """Held as arrays; with an axis name, as this device's shard of arrays."""

    def __init__(self, logits: Float[Array, "R V"], axis_name: str | None):
        self.axis_name = axis_name
        self.rows, local = logits.shape
        self.bits = _BITS_ALONE if axis_name is None else _BITS_SHARDED
        self.size = local * (1 if axis_name is None else lax.axis_size(axis_name))
        first = 0 if axis_name is None else lax.axis_index(axis_name) * local
        self.ids = first + lax.broadcasted_iota(jnp.int32, (1, local), 1)
        self.values = {"logits": logits}

    def _apply(self, fn: _Elementwise, sources: tuple[str, ...]) -> Array:
        return fn(self.ids, *(self.values[name] for name in sources))

    def assign(self, name, fn, *sources):
        # Computed once: two fusions could round it differently, and it is compared for equality.
        self.values[name] = lax.optimization_barrier(self._apply(fn, sources))

    def total(self, fn, *sources):
        return self._across(lax.psum, jnp.sum(self._apply(fn, sources), axis=-1, keepdims=True))

    def largest(self, fn, *sources):
        return self._across(lax.pmax, jnp.max(self._apply(fn, sources), axis=-1, keepdims=True))

    def weight_from(self, thresholds, order, weight):
        ordinals = _ordinal(self.values[order])
        weights = jnp.float32(1) if weight is None else self.values[weight]
        found = [
            jnp.sum(jnp.where(ordinals >= threshold, weights, 0.0), axis=-1, keepdims=True)
            for threshold in thresholds
        ]
        return self._split(self._across(lax.psum, jnp.concatenate(found, axis=-1)))

    def _across(self, reduce: Callable, x: Array) -> Array:
        return x if self.axis_name is None else reduce(x, self.axis_name)

    @staticmethod
    def _split(columns: Float[Array, "R n"]) -> list[_Column]:
        return jnp.split(columns, columns.shape[-1], axis=-1)


class _ArraysOnTpu(_Arrays):
    """Arrays that one kernel reads once for all thresholds."""

    def __init__(self, logits, axis_name, interpret: bool):
        super().__init__(logits, axis_name)
        self.interpret = interpret

    def weight_from(self, thresholds, order, weight):
        sources = [self.values[name] for name in (order, weight) if name is not None]
        columns = jnp.concatenate(thresholds, axis=-1)
        return self._split(self._across(lax.psum, _weight_from(columns, sources, self.interpret)))


class _Tile(_Vocabulary):
    """Rows in VMEM, processed a chunk of tokens at a time."""

    bits = _BITS_ALONE

    def __init__(self, refs: dict[str, Any], size: int, chunk: int = _TPU_CHUNK):
        self.refs, self.size = refs, size
        self.rows, padded = refs["logits"].shape
        self.chunk = min(chunk, padded)
        self.chunks = padded // self.chunk

    def load(self, name: str, start: Array) -> Float[Array, "R m"]:
        values = self.refs[name][:, pl.ds(start, self.chunk)]
        if name == "logits" and self.size % self.chunk:
            values = jnp.where(self.ids(start) < self.size, values, -jnp.inf)
        return values

    def assign(self, name, fn, *sources):
        @pl.loop(0, self.chunks)
        def _(i):
            values = self.apply(fn, sources, i)
            self.refs[name][:, pl.ds(self.start(i), self.chunk)] = values

    def ids(self, start: Array) -> Int[Array, "1 m"]:
        return start + lax.broadcasted_iota(jnp.int32, (1, self.chunk), 1)

    def start(self, i: Array) -> Array:
        return pl.multiple_of(i * self.chunk, self.chunk)

    def apply(self, fn: _Elementwise, sources: tuple[str, ...], i: Array) -> Array:
        start = self.start(i)
        return fn(self.ids(start), *(self.load(name, start) for name in sources))

    def total(self, fn, *sources):
        def add(i, total):
            return total + self.apply(fn, sources, i)

        zeros = jnp.zeros((self.rows, self.chunk), jnp.float32)
        total = lax.fori_loop(0, self.chunks, add, zeros)
        return jnp.sum(total, axis=-1, keepdims=True)

    def largest(self, fn, *sources):
        def maximum(i, largest):
            return jnp.maximum(largest, self.apply(fn, sources, i))

        lowest = jnp.full((self.rows, self.chunk), -jnp.inf, jnp.float32)
        largest = lax.fori_loop(0, self.chunks, maximum, lowest)
        return jnp.max(largest, axis=-1, keepdims=True)

    def weight_from(self, thresholds, order, weight):
        def weights(threshold, ids, ordered, *weighed):
            del ids
            one = weighed[0] if weighed else jnp.float32(1)
            return jnp.where(_ordinal(ordered) >= threshold, one, 0.0)

        sources = (order,) if weight is None else (order, weight)
        return [self.total(functools.partial(weights, t), *sources) for t in thresholds]


class _Row(_Tile):
    """One row in a GPU's memory, likewise."""

    def __init__(self, refs, size, interpret: bool):
        super().__init__(refs, size, _GPU_CHUNK)
        self.interpret = interpret

    def load(self, name, start):
        if name != "logits":
            return super().load(name, start)
        return plgpu.load(
            self.refs[name].at[:, pl.ds(start, self.chunk)],
            mask=self.ids(start) < self.size,
            other=-jnp.inf,
        )

    def assign(self, name, fn, *sources):
        self._wait()
        super().assign(name, fn, *sources)
        self._wait()

    def _wait(self):
        """Until all threads of the program have stored or loaded what they had to."""
        if not self.interpret:
            plgpu.debug_barrier()


def _weight_from(
    thresholds: Int[Array, "R n"], sources: list[Float[Array, "R V"]], interpret: bool
) -> Float[Array, "R n"]:
    """`_Vocabulary.weight_from` for many thresholds, in one reading of the sources."""
    rows, size = sources[0].shape
    count = thresholds.shape[-1]
    chunk = min(_TPU_CHUNK, _round_up(size, _LANES))
    chunks = pl.cdiv(size, chunk)

    def body(thresholds_ref, *refs):
        *source_refs, out_ref = refs

        @pl.when(pl.program_id(1) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        inside = pl.program_id(1) * chunk + lax.broadcasted_iota(jnp.int32, (1, chunk), 1) < size
        ordinals = jnp.where(inside, _ordinal(source_refs[0][...]), _SMALLEST)
        weights = source_refs[1][...] if len(source_refs) == 2 else jnp.float32(1)
        thresholds = thresholds_ref[...]
        found = [
            jnp.sum(
                jnp.where(ordinals >= thresholds[:, i : i + 1], weights, 0.0),
                axis=-1,
                keepdims=True,
            )
            for i in range(count)
        ]
        out_ref[...] += jnp.concatenate(found, axis=-1)

    column = pl.BlockSpec((_TPU_ROWS, count), lambda i, j: (i, 0))
    return pl.pallas_call(
        body,
        grid=(pl.cdiv(rows, _TPU_ROWS), chunks),
        in_specs=[column, *[pl.BlockSpec((_TPU_ROWS, chunk), lambda i, j: (i, j))] * len(sources)],
        out_specs=column,
        out_shape=result_like(sources[0], (rows, count)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="weight_from",
    )(thresholds, *sources)


def _draw(
    vocabulary: _Vocabulary, keys: _Keys, warpers: _Warpers
) -> tuple[Int[Array, "R 1"], _Column, _Column]:
    """Tokens, log-probabilities and warped log-probabilities."""
    peak = vocabulary.largest(lambda ids, x: x, "logits")
    normaliser = peak + jnp.log(vocabulary.total(lambda ids, x: jnp.exp(x - peak), "logits"))
    if warpers.temperature == 0:
        tokens = _first(vocabulary, lambda x: x == peak, "logits")
        return tokens, peak - normaliser, jnp.zeros_like(peak)

    vocabulary.assign("scaled", lambda ids, x: x / warpers.temperature, "logits")
    scaled_peak = peak / warpers.temperature

    def mass() -> _Column:
        return vocabulary.total(lambda ids, x: jnp.exp(x - scaled_peak), "scaled")

    top_k = warpers.top_k
    if top_k is not None and top_k >= vocabulary.size:
        top_k = None
    order = "probability" if top_k is None else "scaled"
    if top_k is not None:
        _cut(vocabulary, float(top_k), order, None)
    total = mass()
    if warpers.top_p < 1:
        vocabulary.assign("probability", lambda ids, x: jnp.exp(x - scaled_peak) / total, "scaled")
        _cut(vocabulary, warpers.top_p, order, "probability")
        total = mass()

    vocabulary.assign("score", lambda ids, x: x + _gumbel(keys, ids), "scaled")
    best = vocabulary.largest(lambda ids, score: score, "score")
    if top_k is None:
        tokens = _first(vocabulary, lambda score: score == best, "score")
    else:
        # After top-k, `draw` looks at tokens from the most likely one on.
        likely = vocabulary.largest(
            lambda ids, score, x: jnp.where(score == best, x, -jnp.inf), "score", "scaled"
        )
        tokens = _first(
            vocabulary, lambda score, x: (score == best) & (x == likely), "score", "scaled"
        )

    def at_token(name: str) -> _Column:
        return vocabulary.largest(lambda ids, x: jnp.where(ids == tokens, x, -jnp.inf), name)

    warped = at_token("scaled") - (scaled_peak + jnp.log(total))
    return tokens, at_token("logits") - normaliser, warped


def _cut(vocabulary: _Vocabulary, limit: float, order: str, weight: str | None) -> None:
    """Sets "scaled" to -inf where the tokens before one in `order` weigh `limit` or more.

    Of equals in order the lower ids come first. `weight` None means that tokens weigh 1.
    """
    sources = (order,) if weight is None else (order, weight)
    id_bits = (vocabulary.size - 1).bit_length()
    threshold = _largest_integer(
        lambda thresholds: [
            weights >= limit for weights in vocabulary.weight_from(thresholds, order, weight)
        ],
        jnp.full((vocabulary.rows, 1), _SMALLEST, jnp.int32),
        32,
        vocabulary.bits,
    )

    def tied_below(end):
        def one(ids, ordered):
            return jnp.where((_ordinal(ordered) == threshold) & (ids < end), 1.0, 0.0)

        return one

    def tied_weight(ids, ordered, *weighed):
        tied = _ordinal(ordered) == threshold
        return jnp.where(tied, weighed[0] if weighed else 1.0, 0.0)

    def above(ids, ordered, *weighed):
        return jnp.where(_ordinal(ordered) > threshold, weighed[0] if weighed else 1.0, 0.0)

    before, each = vocabulary.total(above, *sources), vocabulary.largest(tied_weight, *sources)

    def fits(end: Array) -> Bool[Array, "R 1"]:
        """Whether the limit leaves room for one more after the tied tokens below `end`."""
        return before + vocabulary.total(tied_below(end), order) * each < limit

    everything = jnp.full(threshold.shape, 2**id_bits, jnp.int32)
    all_but_last = vocabulary.total(tied_below(everything), order) - 1
    last = lax.cond(
        jnp.min(jnp.where(before + all_but_last * each < limit, 1.0, 0.0)) > 0,
        lambda: everything,
        lambda: _largest_integer(
            lambda ends: [fits(end) for end in ends],
            jnp.zeros_like(threshold),
            id_bits,
            vocabulary.bits,
        ),
    )

    def keep(ids, x, ordered):
        ordinals = _ordinal(ordered)
        return jnp.where(
            (ordinals > threshold) | ((ordinals == threshold) & (ids <= last)), x, -jnp.inf
        )

    vocabulary.assign("scaled", keep, "scaled", order)


def _largest_integer(
    holds: Callable[[list[Int[Array, "R 1"]]], list[Bool[Array, "R 1"]]],
    smallest: Int[Array, "R 1"],
    bits: int,
    bits_at_once: int,
) -> Int[Array, "R 1"]:
    """The largest integer of `smallest + [0, 2**bits)` for which something holds.

    It must hold for `smallest`, and for every integer below one for which it holds.
    """
    rounds = -(-bits // bits_at_once)

    def add_digit(i, value):
        shift = bits_at_once * (rounds - 1 - i)
        digits = [value + (jnp.int32(digit) << shift) for digit in range(1, 2**bits_at_once)]
        digit = sum(jnp.where(held, 1, 0) for held in holds(digits))
        return value + (digit << shift)

    return lax.fori_loop(0, rounds, add_digit, smallest)


def _ordinal(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """An integer for each float, in the order of the floats; zero has no sign."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _first(vocabulary: _Vocabulary, wanted: _Elementwise, *sources: str) -> Int[Array, "R 1"]:
    """The lowest id of the tokens that are wanted. Ids below 2**24 are exact in f32."""
    lowest = vocabulary.largest(
        lambda ids, *values: jnp.where(wanted(*values), -ids.astype(jnp.float32), -jnp.inf),
        *sources,
    )
    return (-lowest).astype(jnp.int32)


def _gumbel(keys: _Keys, ids: Int[Array, "1 m"]) -> Float[Array, "R m"]:
    """Standard Gumbel noise, a function of key and id. Threefry-2x32 (Salmon et al. 2011)."""
    words = (*keys, keys[0] ^ keys[1] ^ jnp.uint32(0x1BD11BDA))
    low = lax.bitcast_convert_type(ids, jnp.uint32) + words[1]
    high = jnp.zeros_like(low) + words[0]
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            high = high + low
            low = ((low << distance) | (low >> (32 - distance))) ^ high
        high = high + words[(group + 1) % 3]
        low = low + words[(group + 2) % 3] + jnp.uint32(group + 1)
    # 23 random bits, centred in their cells: never 0 and never 1.
    cell = lax.bitcast_convert_type((high ^ low) >> 9, jnp.int32).astype(jnp.float32)
    return -jnp.log(-jnp.log((cell + 0.5) * jnp.float32(2**-23)))


def _registers(logits_ref: Any, scaled_ref: Any, other_ref: Any) -> dict[str, Any]:
    """Where a kernel keeps what `_draw` assigns. Probabilities are not needed with scores."""
    return {
        "logits": logits_ref,
        "scaled": scaled_ref,
        "probability": other_ref,
        "score": other_ref,
    }


def _columns(logits: Float[Array, "R V"]) -> list[jax.ShapeDtypeStruct]:
    shape = (logits.shape[0], 1)
    return [result_like(logits, shape, dtype) for dtype in ("int32", "float32", "float32")]


def _words(key_data: UInt32[Array, "R 2"]) -> _Keys:
    return key_data[:, :1], key_data[:, 1:]


def _drawn(columns: Any) -> Drawn:
    return Drawn(*(column[:, 0] for column in columns))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _check(key_data, logits, temperature, top_k, top_p):
    """Raises a ValueError for arguments that do not fit."""
    if logits.ndim != 2 or logits.dtype != jnp.float32:
        raise ValueError(f"logits must be f32 [R, V]. Got: {logits.dtype} {logits.shape}")
    if key_data.shape != (logits.shape[0], 2) or key_data.dtype != jnp.uint32:
        raise ValueError(
            f"key_data must be uint32 {(logits.shape[0], 2)}, of threefry keys."
            f" Got: {key_data.dtype} {key_data.shape}"
        )
    if temperature != 0 and not 1e-4 <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be 0 (greedy) or finite and at least 1e-4. Got: {temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be None or at least 1. Got: {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]. Got: {top_p}")
