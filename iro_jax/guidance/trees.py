"""The tree of one prompt's search, for people: every chunk, its value, and why it was dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from iro_jax.search import SearchOutput, Trace


@dataclasses.dataclass(frozen=True)
class TreeNode:
    """One candidate: a chunk behind a beam.

    Attributes:
      step: of the search, from 0.
      parent: index of the node that it extends, or None behind the bare prompt.
      text: of the chunk.
      tokens: how many it has.
      score: what guided the search, at its last token.
      values: of every value function.
      log_prob: of the chunk under the policy.
      finished: whether the answer ends here.
      kept: whether it was selected.
      why: what became of it, in words.
    """

    step: int
    parent: int | None
    text: str
    tokens: int
    score: float
    values: tuple[float, ...]
    log_prob: float
    finished: bool
    kept: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def tree_nodes(
    output: SearchOutput,
    row: int,
    read: Callable[[tuple[int, ...]], str],
    *,
    by_score: bool = True,
) -> list[TreeNode]:
    """The candidates of one prompt, step by step.

    Args:
      output: of a batch, on the host.
      row: the prompt's place in it.
      read: from an answer's tokens to its text.
      by_score: whether the selection goes by the scores alone. Otherwise nobody can tell from them
        why a candidate was dropped.
    """
    trace = output.trace
    successors = trace.new.shape[-1]
    nodes: list[TreeNode] = []
    places: dict[int, int] = {}
    answers: dict[int, tuple[int, ...]] = {Trace.ROOT: ()}
    size = trace.num_candidates
    for step in range(int(output.num_steps[row])):
        new = np.asarray(trace.new[step, row]).reshape(size)
        totals = np.asarray(trace.scores.total[step, row]).reshape(size)
        chosen = set(np.asarray(trace.selected[step, row]).tolist())
        parents = np.asarray(trace.parents[step, row])
        lengths = np.asarray(trace.chunk_lengths[step, row]).reshape(size)
        tokens = np.asarray(trace.tokens[step, row]).reshape(size, -1)
        log_probs = np.asarray(trace.token_log_probs[step, row]).reshape(size, -1)
        parts = np.asarray(trace.scores.parts[step, row]).reshape(size, -1)
        ends = np.asarray(trace.finished[step, row]).reshape(size)
        of_slots = {}
        for slot in np.flatnonzero(new).tolist():
            before = answers[int(parents[slot // successors])]
            of_slots[slot] = (*before, *tokens[slot, : lengths[slot]].tolist())
        answers |= {step * size + slot: answer for slot, answer in of_slots.items()}
        for slot, answer in of_slots.items():
            parent = int(parents[slot // successors])
            places[step * size + slot] = len(nodes)
            nodes.append(
                TreeNode(
                    step=step,
                    parent=places.get(parent),
                    text=_added(read(answers[parent]), read(answer)),
                    tokens=int(lengths[slot]),
                    score=float(totals[slot]),
                    values=tuple(map(float, parts[slot])),
                    log_prob=float(log_probs[slot, : lengths[slot]].sum()),
                    finished=bool(ends[slot]),
                    kept=slot in chosen,
                    why=_why(slot, chosen, of_slots, totals, successors, by_score),
                )
            )
    return nodes


def _added(before: str, after: str) -> str:
    """What a chunk adds to a text; its last character may have been unfinished before."""
    common = 0
    while common < min(len(before), len(after)) and before[common] == after[common]:
        common += 1
    return after[common:]


def _why(
    slot: int,
    chosen: set[int],
    answers: dict[int, tuple[int, ...]],
    totals: np.ndarray,
    successors: int,
    by_score: bool,
) -> str:
    if slot in chosen:
        return "kept"
    if any(answers[other] == answers[slot] for other in chosen if other in answers):
        return "dropped: the same answer was kept already"
    if not by_score:
        return "dropped: the method's rule, which goes by more than the score, took another"
    lowest = min(float(totals[other]) for other in chosen)
    if totals[slot] < lowest:
        return f"dropped: below {lowest:.3f}, the lowest score that was kept"
    if any(other // successors == slot // successors for other in chosen):
        return "dropped: another successor of the same beam was kept"
    return "dropped: the selection passed it over"
