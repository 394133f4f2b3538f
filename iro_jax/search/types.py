"""What a search passes around: frozen dataclasses of arrays, all of them pytrees.

Letters, here and in the whole room: P prompts, K beams (`beam_width`), B successors of a
beam (`num_successors`), U = K * B candidates, L tokens of a chunk (`chunk_length`), H tokens
of the longest answer (`capacity`), S steps, T value functions, M finalists. Candidate
`k * B + b` is successor b of row k.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

import jax
from jaxtyping import Array, Bool, Float, Int

PyTree = Any


class Memory(Protocol):
    """What a function of the search remembers about the beams, such as a key-value cache."""

    def commit(self, parents: Int[Array, "P K"]) -> Memory:
        """The memory of the beams that continue candidates `parents`, each in `[0, U)`."""
        ...

    def admit(self, rows: Int[Array, " A"], newcomers: Memory) -> Memory:
        """The memory with A other prompts in the place of those in `rows`.

        Only `iro_jax.search.continuous` asks for it.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What guides the search; `lead` is `[P]`, `[P, K]`, `[P, K, B]` or `[P, M]`.

    Attributes:
      total: what selection compares, for IRO the sum of V_t / beta_t (equation 8), `[*lead]`.
      parts: every value function's own value V_t, `[*lead, T]`.
    """

    total: Float[Array, "*lead"]
    parts: Float[Array, "*lead T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Root:
    """Where the search starts: prompts that have been read.

    Attributes:
      expand_memory: of `expand_fn`; a pytree of arrays and `Memory` objects whose rows are K
        times the prompt.
      score_memory: the same for `score_fn`.
      scores: of the bare prompts, `[P]`.
    """

    expand_memory: PyTree
    score_memory: PyTree
    scores: Scores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """The K sequences of every prompt that survived the last selection.

    Attributes:
      tokens: the answers so far, zero after their ends, `[P, K, H]`.
      lengths: their numbers of tokens, `[P, K]`.
      ended: whether EOS or a stop string ended them, `[P, K]`.
      finished: whether they are complete: ended, or cut at H, `[P, K]`.
      log_probs: under the policy, summed over tokens, `[P, K]`.
      scores: at their last tokens, `[P, K]`.
      nodes: where they are in the tree, `[P, K]`; see `Trace`.
    """

    tokens: Int[Array, "P K H"]
    lengths: Int[Array, "P K"]
    ended: Bool[Array, "P K"]
    finished: Bool[Array, "P K"]
    log_probs: Float[Array, "P K"]
    scores: Scores
    nodes: Int[Array, "P K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frontier:
    """What `expand_fn` extends.

    Attributes:
      step: how many chunks came before, `[P]`.
      beams: the prefix of each row. With `reuse_finished` the row of a finished beam holds a
        copy of another one.
      open: the slots that want a successor, `[P, K, B]`; the others are thrown away.
      room: how many tokens each row may still get, `[P, K]`.
      memory: what the function returned last time, committed to the rows.
    """

    step: Int[Array, " P"]
    beams: Beams
    open: Bool[Array, "P K B"]
    room: Int[Array, "P K"]
    memory: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """What `expand_fn` returns: B successors of every row.

    Attributes:
      tokens: anything after their ends, `[P, K, B, L]`.
      lengths: numbers of tokens, 1 to min(L, room), `[P, K, B]`.
      ended: whether EOS or a stop string came last, `[P, K, B]`.
      log_probs: of each token under the policy, `[P, K, B, L]`.
      features: whatever `score_fn` would like to have, or None.
      valid: false where there is no such successor, `[P, K, B]`; None if there always is.
        Every row needs one.
    """

    tokens: Int[Array, "P K B L"]
    lengths: Int[Array, "P K B"]
    ended: Bool[Array, "P K B"]
    log_probs: Float[Array, "P K B L"]
    features: PyTree = None
    valid: Bool[Array, "P K B"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """The U competitors of one selection: new successors, and finished beams.

    A finished beam is carried in the first slot of its row, with an empty chunk. Everything
    that describes a sequence is about the whole answer, chunk included.

    Attributes:
      beams: the survivors of the last selection. Successors in row k extend beam
        `rows[k]`; a finished beam k is carried in row k itself.
      rows: the beam that each row extends, `[P, K]`; `k` itself but with `reuse_finished`.
      tokens: of the chunk, zero after its end, `[P, K, B, L]`.
      chunk_lengths: `[P, K, B]`.
      token_log_probs: of the chunk's tokens under the policy, `[P, K, B, L]`.
      lengths, ended, finished, log_probs, nodes: as in `Beams`, `[P, K, B]`.
      new: which are successors of this step, `[P, K, B]`.
      valid: which exist: new ones and carried ones.
      features: from `expand_fn`.
      prompt_scores: of the bare prompts, `[P]`.
    """

    beams: Beams
    rows: Int[Array, "P K"]
    tokens: Int[Array, "P K B L"]
    chunk_lengths: Int[Array, "P K B"]
    token_log_probs: Float[Array, "P K B L"]
    lengths: Int[Array, "P K B"]
    ended: Bool[Array, "P K B"]
    finished: Bool[Array, "P K B"]
    log_probs: Float[Array, "P K B"]
    nodes: Int[Array, "P K B"]
    new: Bool[Array, "P K B"]
    valid: Bool[Array, "P K B"]
    features: PyTree
    prompt_scores: Float[Array, " P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """The tree that was searched. The candidate c of step s is node `s * U + c`.

    A prompt has no candidates and no competitors in the steps from its `num_steps` on.

    Attributes:
      parents: node of the prefix of each row, or `ROOT`, `[S, P, K]`.
      tokens: of the chunks, `[S, P, K, B, L]`.
      token_log_probs: under the policy, `[S, P, K, B, L]`.
      chunk_lengths: `[S, P, K, B]`.
      ended, finished: as in `Beams`, `[S, P, K, B]`.
      new: which candidates were made in this step, `[S, P, K, B]`; only they are nodes.
      scores: of every competitor, carried ones included, `[S, P, K, B]`; -inf where none is.
      selected: the candidates that became beams, `[S, P, K]`.
    """

    ROOT: ClassVar[int] = -1

    parents: Int[Array, "S P K"]
    tokens: Int[Array, "S P K B L"]
    token_log_probs: Float[Array, "S P K B L"]
    chunk_lengths: Int[Array, "S P K B"]
    ended: Bool[Array, "S P K B"]
    finished: Bool[Array, "S P K B"]
    new: Bool[Array, "S P K B"]
    scores: Scores
    selected: Int[Array, "S P K"]

    @property
    def num_candidates(self) -> int:
        """U."""
        return self.tokens.shape[2] * self.tokens.shape[3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Finished candidates that were selected once, best first, at most U of each prompt.

    Attributes:
      nodes: or `EMPTY`, `[P, U]`.
      totals: their scores, -inf where empty, `[P, U]`.
    """

    EMPTY: ClassVar[int] = -2

    nodes: Int[Array, "P U"]
    totals: Float[Array, "P U"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchState:
    """A search between two chunks.

    Attributes:
      limit: most tokens of an answer, `[P]`.
      prompt_scores: of the bare prompts, `[P]`.
      beams: the survivors.
      pool: finished ones among all earlier survivors.
      trace: what happened so far.
      expand_memory, score_memory: of the two functions, committed to the rows.
      num_steps: chunks that each prompt took part in, `[P]`.
      num_tokens: tokens sampled for each prompt, `[P]`.
      num_queries: value functions asked, a candidate and a value function at a time, `[P]`.
      nonfinite: whether a score was NaN or infinite, `[P]`.
    """

    limit: Int[Array, " P"]
    prompt_scores: Float[Array, " P"]
    beams: Beams
    pool: Pool
    trace: Trace
    expand_memory: PyTree
    score_memory: PyTree
    num_steps: Int[Array, " P"]
    num_tokens: Int[Array, " P"]
    num_queries: Int[Array, " P"]
    nonfinite: Bool[Array, " P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Finalists:
    """Complete answers.

    Attributes:
      tokens: with their EOS, zero after their ends, `[P, M, H]`.
      lengths: numbers of tokens, EOS included, `[P, M]`.
      ended: whether EOS or a stop string ended them, rather than H, `[P, M]`.
      log_probs: of each token under the policy, zero after the end, `[P, M, H]`.
      scores: at their last tokens, `[P, M]`; -inf where there is no answer.
      nodes: where they are in the tree, `[P, M]`.
      valid: which of the M entries are answers, `[P, M]`.
    """

    tokens: Int[Array, "P M H"]
    lengths: Int[Array, "P M"]
    ended: Bool[Array, "P M"]
    log_probs: Float[Array, "P M H"]
    scores: Scores
    nodes: Int[Array, "P M"]
    valid: Bool[Array, "P M"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchOutput:
    """The result of a search.

    Attributes:
      finalists: M = 2 * U + K entries: the pool, the last candidate set without fragments,
        and finished beams that the full pool has lost. Most of them are usually empty.
      ranking: their indices, the best first and those that are no answers last, `[P, M]`.
      best: the index of the answer, `[P]`; by score until `choose` says otherwise.
      beams: the last selection, K complete answers with repetitions: the particles of
        `resample`, `[P, K]`.
      trace: the tree.
      num_steps, num_tokens, num_queries, nonfinite: as in `SearchState`.
    """

    finalists: Finalists
    ranking: Int[Array, "P M"]
    best: Int[Array, " P"]
    beams: Finalists
    trace: Trace
    num_steps: Int[Array, " P"]
    num_tokens: Int[Array, " P"]
    num_queries: Int[Array, " P"]
    nonfinite: Bool[Array, " P"]


class ExpandFn(Protocol):
    """Gives every live beam B successors of up to L tokens."""

    def __call__(self, params: PyTree, keys: Array, frontier: Frontier) -> tuple[Chunk, PyTree]: ...


class ScoreFn(Protocol):
    """Scores candidates at their last tokens; only those that are `new` are looked at."""

    def __call__(
        self, params: PyTree, candidates: Candidates, memory: PyTree
    ) -> tuple[Scores, PyTree]: ...


class SelectFn(Protocol):
    """Picks K of U candidates, `[P, K]`; `scores` is `[P, U]`, -inf where there is none."""

    def __call__(
        self, keys: Array, scores: Float[Array, "P U"], candidates: Candidates
    ) -> Int[Array, "P K"]: ...
