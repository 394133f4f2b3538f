"""The fused draw, written once over a `Vocabulary`.

That is named arrays, one number a token, that can be computed elementwise and reduced. It is
held as arrays (XLA), as a tile in a TPU's VMEM, or as a row in a GPU's memory.

The warpers keep the tokens whose more likely predecessors weigh less than a limit: each token
weighs 1 and the limit is k, or it weighs its probability and the limit is top_p. Floats are
ordered like integers made of their bits, so the weight above a threshold, asked for a few
thresholds at a time, leads to the last integer that still has too much above it: digit by
digit, in 32 bits. Only sums and maxima run over the vocabulary, so it may lie in shards.

Letters: R rows, V vocabulary size (of a shard, where there are shards), n thresholds.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

SMALLEST = -(2**31)

# One threshold at a time costs the least arithmetic.
BITS_ALONE = 1

Column = Float[Array, "R 1"]
Keys = tuple[UInt32[Array, "R 1"], UInt32[Array, "R 1"]]
Elementwise = Callable[..., Array]


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


class Warpers(NamedTuple):
    temperature: float
    top_k: int | None
    top_p: float


class Vocabulary(abc.ABC):
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

    @abc.abstractmethod
    def assign(self, name: str, fn: Elementwise, *sources: str) -> None:
        """Keeps what `fn` gives under a name."""

    @abc.abstractmethod
    def total(self, fn: Elementwise, *sources: str) -> Column:
        """The sum of what `fn` gives over all tokens."""

    @abc.abstractmethod
    def largest(self, fn: Elementwise, *sources: str) -> Column:
        """The largest of what `fn` gives."""

    @abc.abstractmethod
    def weight_from(
        self, thresholds: list[Int[Array, "R 1"]], order: str, weight: str | None
    ) -> list[Column]:
        """For each threshold: what tokens weigh whose `order` is not below it; 1 each by default.

        Thresholds are integers in the sense of `ordinal`.
        """


def draw(
    vocabulary: Vocabulary, keys: Keys, warpers: Warpers
) -> tuple[Int[Array, "R 1"], Column, Column]:
    """Tokens, log-probabilities and warped log-probabilities."""
    peak = vocabulary.largest(lambda ids, x: x, "logits")
    normaliser = peak + jnp.log(vocabulary.total(lambda ids, x: jnp.exp(x - peak), "logits"))
    if warpers.temperature == 0:
        tokens = _first(vocabulary, lambda x: x == peak, "logits")
        return tokens, peak - normaliser, jnp.zeros_like(peak)

    vocabulary.assign("scaled", lambda ids, x: x / warpers.temperature, "logits")
    scaled_peak = peak / warpers.temperature

    def mass() -> Column:
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

    def at_token(name: str) -> Column:
        return vocabulary.largest(lambda ids, x: jnp.where(ids == tokens, x, -jnp.inf), name)

    warped = at_token("scaled") - (scaled_peak + jnp.log(total))
    return tokens, at_token("logits") - normaliser, warped


def _cut(vocabulary: Vocabulary, limit: float, order: str, weight: str | None) -> None:
    """Sets "scaled" to -inf where the tokens before one in `order` weigh `limit` or more.

    Of equals in order the lower ids come first. `weight` None means that tokens weigh 1.
    """
    sources = (order,) if weight is None else (order, weight)
    id_bits = (vocabulary.size - 1).bit_length()
    threshold = _largest_integer(
        lambda thresholds: [
            weights >= limit for weights in vocabulary.weight_from(thresholds, order, weight)
        ],
        jnp.full((vocabulary.rows, 1), SMALLEST, jnp.int32),
        32,
        vocabulary.bits,
    )

    def tied_below(end):
        def one(ids, ordered):
            return jnp.where((ordinal(ordered) == threshold) & (ids < end), 1.0, 0.0)

        return one

    def tied_weight(ids, ordered, *weighed):
        tied = ordinal(ordered) == threshold
        return jnp.where(tied, weighed[0] if weighed else 1.0, 0.0)

    def above(ids, ordered, *weighed):
        return jnp.where(ordinal(ordered) > threshold, weighed[0] if weighed else 1.0, 0.0)

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
        ordinals = ordinal(ordered)
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


def ordinal(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """An integer for each float, in the order of the floats; zero has no sign."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _first(vocabulary: Vocabulary, wanted: Elementwise, *sources: str) -> Int[Array, "R 1"]:
    """The lowest id of the tokens that are wanted. Ids below 2**24 are exact in f32."""
    lowest = vocabulary.largest(
        lambda ids, *values: jnp.where(wanted(*values), -ids.astype(jnp.float32), -jnp.inf),
        *sources,
    )
    return (-lowest).astype(jnp.int32)


def _gumbel(keys: Keys, ids: Int[Array, "1 m"]) -> Float[Array, "R m"]:
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


def words_of(key_data: UInt32[Array, "R 2"]) -> Keys:
    return key_data[:, :1], key_data[:, 1:]


def as_drawn(columns: Any) -> Drawn:
    return Drawn(*(column[:, 0] for column in columns))
