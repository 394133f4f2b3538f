"""Value networks with another tokenizer than the policy's.

A value network reads the answer as its own tokenizer would write it: the policy's tokens
become text, the text becomes the network's tokens. A few more words may change the last of
these, so every candidate continues from the tokens that it still shares with its beam:

    policy    | The | film | was | unbeliev |     then  | able | !
    value     | The film was un believ |           keeps "The film was", adds "unbelievable !"

Only the text behind the last safe boundary is tokenised again. A boundary lies before a space
that follows something else, provided that no token of the vocabulary spans such a place;
whether the tokenizer keeps to this is tried out when the bridge is built. Bytes that are not
yet a character wait until they are one.

Letters: P prompts, K beams, B successors, H tokens of the policy, F tokens of the network,
N tokens of a candidate that its beam does not have (`slots`).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from transformers import PreTrainedTokenizerBase

from iro_jax.guidance.params import GuidedParams
from iro_jax.guidance.scorers import Sizes, ValueSum
from iro_jax.models import Network
from iro_jax.models.cache import inherit
from iro_jax.models.network import Depth
from iro_jax.models.token_bytes import token_bytes
from iro_jax.search import Candidates, Scores, sequences
from iro_jax.search.tree import take
from iro_jax.values import AnyMemory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForeignPrefix:
    """Candidates in the network's tokens; after a commit, their beams.

    Attributes:
      tokens: of the answers, zero after their ends, `[P, K, B, F]`.
      lengths: their numbers, `[P, K, B]`.
      safe_tokens: how many of them lie before the last safe boundary, `[P, K, B]`.
      safe_characters: where that boundary lies in the text, `[P, K, B]`.
    """

    tokens: Int[Array, "P K B F"]
    lengths: Int[Array, "P K B"]
    safe_tokens: Int[Array, "P K B"]
    safe_characters: Int[Array, "P K B"]

    def commit(self, parents: Int[Array, "P K"]) -> ForeignPrefix:
        return jax.tree.map(lambda x: inherit(x, parents), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Crossing:
    """Chunks in the network's tokens.

    Attributes:
      tokens: what each candidate adds to what it keeps of its beam, `[P, K, B, N]`.
      counts: how many there are; 0 where there is no text yet, -1 where N is too small.
      kept: how many of its beam's tokens it keeps, `[P, K, B]`.
      prefix: the whole candidates.
    """

    tokens: Int[Array | np.ndarray, "P K B N"]
    counts: Int[Array | np.ndarray, "P K B"]
    kept: Int[Array | np.ndarray, "P K B"]
    prefix: ForeignPrefix


class Bridge:
    """From a policy's tokens to another tokenizer's.

    Args:
      policy_tokens: the bytes of every token of the policy; see `token_bytes`.
      eos_ids: the policy's tokens that end an answer.
      tokenizer: of the value network.
      end_id: the token that ends an answer for the value network.
      vocab_size: of the value network.
      slots: N, room for the tokens that a candidate does not share with its beam. A chunk
        of rare characters may need several times `chunk_length`; if one needs more, its score
        is NaN and `overflowed` is set, and a `widened` bridge can take its place.
    """

    def __init__(
        self,
        policy_tokens: Sequence[bytes],
        eos_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        end_id: int,
        *,
        vocab_size: int,
        slots: int,
    ):
        if slots < 1:
            raise ValueError(f"slots must be at least 1. Got: {slots}")
        self.policy_tokens = tuple(policy_tokens)
        self.eos_ids = frozenset(eos_ids)
        self.tokenizer = tokenizer
        self.end_id = end_id
        self.slots = slots
        self.overflowed = False
        self.boundaries = Boundaries.of(tokenizer, vocab_size)

    def widened(self) -> Bridge:
        """The same bridge with twice the slots."""
        other = copy.copy(self)
        other.slots, other.overflowed = 2 * self.slots, False
        return other

    def text(self, tokens: Sequence[int], *, complete: bool) -> str:
        """The text of the policy's tokens, without bytes that are not yet a character.

        Args:
          complete: nothing will follow, so such bytes are shown as U+FFFD.
        """
        data = b"".join(self.policy_tokens[token] for token in tokens)
        if not complete:
            data = data[: len(data) - _pending(data)]
        return data.decode(errors="replace")

    def foreign_tokens(self, tokens: Sequence[int], *, complete: bool) -> list[int]:
        """The network's tokens of a whole answer: what every crossing must agree with."""
        [ids] = self._encode([self.text(tokens, complete=complete)])
        return ids + self._end(tokens)

    def cross(
        self,
        tokens: Int[Array | np.ndarray, "P K B H"],
        lengths: Int[Array | np.ndarray, "P K B"],
        finished: Bool[Array | np.ndarray, "P K B"],
        new: Bool[Array | np.ndarray, "P K B"],
        prefix: ForeignPrefix,
    ) -> Crossing:
        """Re-tokenises candidates, on the host.

        Args:
          tokens, lengths, finished: the candidates' whole answers.
          new: which candidates to look at.
          prefix: their beams.
        """
        tokens, lengths, finished, new = map(np.asarray, (tokens, lengths, finished, new))
        before = jax.tree.map(np.asarray, prefix)
        after = jax.tree.map(np.array, before)
        added = np.zeros((*new.shape, self.slots), np.int32)
        counts, kept = np.zeros(new.shape, np.int32), np.zeros(new.shape, np.int32)

        candidates = list(zip(*np.nonzero(new), strict=True))
        answers = [tokens[c][: lengths[c]].tolist() for c in candidates]
        texts = [
            self.text(answer, complete=bool(finished[c]))
            for c, answer in zip(candidates, answers, strict=True)
        ]
        starts = [int(before.safe_characters[c]) for c in candidates]
        ends = [self.boundaries.last(t, s) for t, s in zip(texts, starts, strict=True)]
        pieces = [
            self.boundaries.piece(text, *span)
            for text, start, end in zip(texts, starts, ends, strict=True)
            for span in ((start, end), (end, len(text)))
        ]
        encoded = self._encode(pieces)

        for i, c in enumerate(candidates):
            old = before.tokens[c][: before.lengths[c]].tolist()
            settled = old[: before.safe_tokens[c]] + encoded[2 * i]
            whole = settled + encoded[2 * i + 1] + self._end(answers[i])
            shared = _shared(old, whole)
            if whole and shared == len(whole):
                shared -= 1  # The last token is read again: its value is what is asked for.
            change = whole[shared:]
            kept[c] = shared
            if len(change) > self.slots:
                counts[c] = -1
                self.overflowed = True
                continue
            counts[c] = len(change)
            added[c][: len(change)] = change
            after.tokens[c][:] = 0
            after.tokens[c][: len(whole)] = whole
            after.lengths[c] = len(whole)
            after.safe_tokens[c] = len(settled)
            after.safe_characters[c] = ends[i]
        return Crossing(added, counts, kept, after)

    def _end(self, tokens: Sequence[int]) -> list[int]:
        return [self.end_id] if tokens and tokens[-1] in self.eos_ids else []

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


@dataclasses.dataclass(frozen=True)
class Boundaries:
    """Where a tokenizer's text may be cut without a change of its tokens.

    Attributes:
      rule: `keep` the space in front of a piece, `strip` it because the tokenizer adds one,
        or `none`: there are no such places.
      joined: characters after which a token of the vocabulary may contain a space.
    """

    rule: str
    joined: frozenset[str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Boundaries:
        """Finds the rule by trying both on samples of many kinds of text."""
        joined = set()
        for token in token_bytes(tokenizer, vocab_size):
            text = token.decode(errors="replace")
            for before, space in itertools.pairwise(text):
                if space == " " and not before.isspace():
                    joined.add(before)

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        for rule in ("keep", "strip"):
            found = cls(rule, frozenset(joined))
            cuts = [
                (sample, place)
                for sample in _SAMPLES
                for place in range(1, len(sample))
                if found._is_safe(sample, place)
            ]
            if all(
                encode(found.piece(sample, 0, place))
                + encode(found.piece(sample, place, len(sample)))
                == encode(sample)
                for sample, place in cuts
            ):
                return found
        return cls("none", frozenset())

    def last(self, text: str, start: int) -> int:
        """The last boundary behind `start`, or `start`."""
        for place in range(len(text) - 1, start, -1):
            if self._is_safe(text, place):
                return place
        return start

    def piece(self, text: str, start: int, end: int) -> str:
        """The text from one boundary to another (or to an end), as it has to be tokenised."""
        return text[start + (self.rule == "strip" and start > 0) : end]

    def _is_safe(self, text: str, place: int) -> bool:
        before = text[place - 1]
        if self.rule == "none" or text[place] != " " or before.isspace() or before in self.joined:
            return False
        # A tokenizer that adds a space would swallow a run of them.
        return self.rule == "keep" or text[place + 1 : place + 2].strip() != ""


@dataclasses.dataclass(frozen=True)
class BridgedValues:
    """A `ValueSum` whose networks have another tokenizer than the policy.

    On CPU the bridge is called from within the compiled search. With `HostSearch` it runs in
    between: pass `observe` as its `observe_fn`.

    Attributes:
      values: the networks; all of them have the bridge's tokenizer.
      bridge: from the policy's tokens.
    """

    values: ValueSum
    bridge: Bridge
    features: tuple[Depth, ...] = dataclasses.field(default=(), init=False)

    def check(self, policy: Network) -> None:
        if len(self.bridge.policy_tokens) < policy.config.vocab_size:
            raise ValueError(
                f"The policy has {policy.config.vocab_size} tokens. Got: a bridge for"
                f" {len(self.bridge.policy_tokens)}"
            )
        for network in self.values.networks:
            known, own = len(self.bridge.tokenizer), network.network.config.vocab_size
            if own < known:
                raise ValueError(
                    f"The bridge's tokenizer has {known} tokens, more than a value network"
                    f" knows. Got: vocab_size={own}"
                )

    def root(self, params, tokens, mask, features, sizes: Sizes):
        slots = self.bridge.slots
        sizes = dataclasses.replace(sizes, chunk_length=slots)
        scores, memory = self.values.root(params, tokens, mask, features, sizes)
        lead = (tokens.shape[0], sizes.beam_width, sizes.num_successors)
        zeros = jnp.zeros(lead, jnp.int32)
        room = jnp.zeros((*lead, sizes.max_steps * slots), jnp.int32)
        return scores, (ForeignPrefix(room, zeros, zeros, zeros), memory)

    def observe(self, candidates: Candidates, memory) -> Crossing:
        """The bridge's part on the host; an `observe_fn` of `HostSearch`."""
        return self.bridge.cross(*jax.device_get((*self._answers(candidates), memory[0])))

    def __call__(
        self,
        params: GuidedParams,
        candidates: Candidates,
        memory: tuple[ForeignPrefix, tuple[AnyMemory, ...]],
    ):
        prefix, of_values = memory
        crossing = candidates.features
        if not isinstance(crossing, Crossing):
            crossing = self._cross_from_program(candidates, prefix)
        inside = jnp.arange(self.bridge.slots) < crossing.counts[..., None]
        scores, of_values = self.values.extend(
            params, jnp.asarray(crossing.tokens), inside, of_values, jnp.asarray(crossing.kept)
        )

        def or_before(scored, before):
            counts = crossing.counts.reshape(*crossing.counts.shape, *(1,) * (scored.ndim - 3))
            before = take(before, candidates.rows)[:, :, None]
            return jnp.where(counts > 0, scored, jnp.where(counts == 0, before, jnp.nan))

        scores = Scores(
            total=or_before(scores.total, candidates.beams.scores.total),
            parts=or_before(scores.parts, candidates.beams.scores.parts),
        )
        return scores, (crossing.prefix, of_values)

    def _cross_from_program(self, candidates: Candidates, prefix: ForeignPrefix) -> Crossing:
        lead = candidates.new.shape

        def shape(*trailing):
            return jax.ShapeDtypeStruct((*lead, *trailing), jnp.int32)

        result = Crossing(
            tokens=shape(self.bridge.slots),
            counts=shape(),
            kept=shape(),
            prefix=ForeignPrefix(shape(prefix.tokens.shape[-1]), shape(), shape(), shape()),
        )
        return jax.pure_callback(self.bridge.cross, result, *self._answers(candidates), prefix)

    @staticmethod
    def _answers(candidates: Candidates) -> tuple[Array, Array, Array, Array]:
        tokens = sequences(candidates).reshape(*candidates.new.shape, -1)
        return tokens, candidates.lengths, candidates.finished, candidates.new


def _pending(data: bytes) -> int:
    """How many bytes at the end begin a character that is not complete."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2
            return back if back < length else 0
        if byte < 0x80:
            return 0
    return 0


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


_SAMPLES = (
    "The quick brown fox, it's said, doesn't jump over 12345 lazy dogs... or does it? Yes!",
    "  two  spaces   three\n\n\tindented = f(x, y)  # comment\n    return {'a': [1, 2.5e-3]}\n ",
    "naïve café über straße — “quoted” … 50 % of € 3,20; a\u0301 e\u0301 привет мир مرحبا שלום",
    "你好 世界、こんにちは 世界。 안녕 세계",
    "emoji 😀 👨\u200d👩\u200d👧 flags 🇩🇪 <b>bold</b> \\frac{1}{2} $x^2$ \r\n end",
)
