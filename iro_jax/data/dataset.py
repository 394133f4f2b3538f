"""What a value function trains on: which rollouts, which prompts are held out, in what order.

The rollouts of a run become the dataset D_t by `choose`, are divided by `split_by_prompt`,
and, once the values room has made arrays of them, come in `batches`. Every choice depends on
seeds and prompt ids, never on the order in which rollouts were stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import grain
import numpy as np

from iro_jax.data.prompts import digest
from iro_jax.data.rollouts import Rollout

Example = dict[str, np.ndarray]


def choose(
    rollouts: Sequence[Rollout],
    which: Literal["best", "all", "one"] = "all",
    *,
    seed: int = 0,
    mixed_only: bool = False,
) -> list[Rollout]:
    """The rollouts of the dataset D_t.

    The candidates of a prompt are its rollouts of one iteration; those of several iterations
    may be given together, as compression (10) needs them.

    Args:
      rollouts: of the run.
      which: `all` candidates; `best`, the highest reward among a prompt's, as in the authors'
        code (the lower candidate number where rewards are equal); or `one`, drawn from seed,
        iteration and prompt id, which is a sample of the policy itself. Measured after three
        iterations of `configs/smollm2.py` on 80 validation prompts, what the reward picks had
        3.51 with `all`, 3.35 with `best` and 3.25 with `one` (the last 0.27 below `all`, 0.03 to
        0.51), and guided samples 2.75, 3.07 and 3.04 (both about 0.3 above `all`, 0.01 to 0.61).
      seed: for `one`.
      mixed_only: leaves out prompts whose candidates are all right or all wrong, as the paper
        does with verifiable rewards (49), because they say nothing about what makes an answer
        right. Rewards must be 0 or 1.

    Returns:
      A prompt's candidates by number, prompts in the order in which they come first.

    Raises:
      ValueError: `which` is unknown, or `mixed_only` meets other rewards or leaves nothing.
    """
    if which not in ("best", "all", "one"):
        raise ValueError(f"which must be 'best', 'all' or 'one'. Got: {which!r}")
    groups: dict[tuple[int, str], list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault((rollout.iteration, rollout.prompt.id), []).append(rollout)
    for group in groups.values():
        group.sort(key=lambda rollout: rollout.candidate)
    if mixed_only:
        groups = _mixed(groups)
    if which == "all":
        return [rollout for group in groups.values() for rollout in group]
    if which == "best":
        # max returns the first of equals.
        return [max(group, key=lambda rollout: rollout.reward) for group in groups.values()]
    return [
        group[int(_uniform(seed, "one", iteration, id) * len(group))]
        for (iteration, id), group in groups.items()
    ]


def split_by_prompt(
    rollouts: Sequence[Rollout], fraction: float, seed: int
) -> tuple[list[Rollout], list[Rollout]]:
    """Divides rollouts into a part to train on and one to hold out.

    No prompt is on both sides. Which side a prompt is on depends on its id and the seed only:
    what one iteration held out, no other iteration trains on. (The exception are sets so
    small that one side would be empty: it gets the prompt that is nearest to it.)

    Args:
      rollouts: of any iterations.
      fraction: of the prompts to hold out, about.
      seed: any integer.

    Returns:
      `(train, held_out)`, each in the order of `rollouts`.

    Raises:
      ValueError: `fraction` is not between 0 and 1, or there are fewer than two prompts.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, neither included. Got: {fraction}")
    places = {
        id: _uniform(seed, "held out", id)
        for id in dict.fromkeys(rollout.prompt.id for rollout in rollouts)
    }
    if len(places) < 2:
        raise ValueError(f"A split needs rollouts of at least two prompts. Got: {len(places)}")
    held_out = {id for id, place in places.items() if place < fraction}
    if not held_out:
        held_out = {min(places, key=places.__getitem__)}
    if len(held_out) == len(places):
        held_out.remove(max(places, key=places.__getitem__))
    return (
        [rollout for rollout in rollouts if rollout.prompt.id not in held_out],
        [rollout for rollout in rollouts if rollout.prompt.id in held_out],
    )


def num_batches(
    num_examples: int,
    *,
    batch_size: int,
    num_epochs: int | None = 1,
    drop_remainder: bool = True,
) -> int | None:
    """How many batches `batches` gives with the same arguments; None if it never ends."""
    if num_examples < 1 or batch_size < 1 or (num_epochs is not None and num_epochs < 1):
        raise ValueError(
            "Examples, batch size and epochs must be at least 1. "
            f"Got: {num_examples}, {batch_size} and {num_epochs}"
        )
    if num_epochs is None:
        return None
    total = num_examples * num_epochs
    return max(1, total // batch_size) if drop_remainder else -(-total // batch_size)


def batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    num_epochs: int | None = 1,
    seed: int,
    drop_remainder: bool = True,
) -> grain.DatasetIterator[Example]:
    """Batches in an order that depends on the seed only, and that can be continued.

    Every epoch has every example once, in an order of its own. A batch may span two epochs,
    so that all batches have the same size and a program is compiled once; only the very last
    may be incomplete, and is left out unless `drop_remainder` is False. Where nothing would be
    left, because the examples of all epochs are fewer than `batch_size`, further epochs fill
    one batch.

    `iterator.get_state()` is a small JSON object that says where the iterator stands; after
    `set_state` with it, an iterator from the same arguments goes on with the same batches.

    Args:
      examples: equally shaped arrays under the same names; anything with `len` and indexing.
      batch_size: examples in a batch.
      num_epochs: None for no end.
      seed: of the order, any integer.
      drop_remainder: whether the incomplete last batch is left out; otherwise, it is smaller.

    Returns:
      An iterator over examples stacked along a new first axis.

    Raises:
      ValueError: there are no examples, or a size is less than 1.
    """
    num_batches(len(examples), batch_size=batch_size, num_epochs=num_epochs)  # checks them
    if drop_remainder and num_epochs is not None:
        num_epochs = max(num_epochs, -(-batch_size // len(examples)))
    ordered = grain.MapDataset.source(examples).seed(_seed(seed)).shuffle().repeat(num_epochs)
    batched = ordered.batch(batch_size, drop_remainder=drop_remainder)
    # The examples are in memory: threads that fetch them ahead would only compete with XLA's.
    return iter(batched.to_iter_dataset(grain.ReadOptions(num_threads=0)))


def _seed(seed: int) -> int:
    """Grain's seeds have 32 bits."""
    return int.from_bytes(digest("batches", seed)[:4])


def _uniform(*parts: str | int) -> float:
    """A number in [0, 1), uniform over the parts."""
    return (int.from_bytes(digest(*parts)[:8]) >> 11) / 2**53


def _mixed(groups: dict[tuple[int, str], list[Rollout]]) -> dict[tuple[int, str], list[Rollout]]:
    rewards = {rollout.reward for group in groups.values() for rollout in group}
    if not rewards <= {0.0, 1.0}:
        raise ValueError(
            f"mixed_only needs rewards of 0 or 1. Got: {sorted(rewards - {0.0, 1.0})[:3]}"
        )
    mixed = {
        key: group
        for key, group in groups.items()
        if len({rollout.reward for rollout in group}) == 2
    }
    if not mixed:
        raise ValueError(
            "mixed_only needs prompts with both right and wrong candidates. "
            f"Got: none among {len(groups)}"
        )
    return mixed
