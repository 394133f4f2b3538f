"""D_t: which rollouts, which prompts are held out, and batches that can be continued."""

import json
import random

import numpy as np
import pytest

from iro_jax.data import Prompt, Rollout, batches, choose, num_batches, split_by_prompt


def rollout(id, candidate, reward, iteration=0):
    return Rollout(
        prompt=Prompt(id, "text"),
        prompt_tokens=[1],
        tokens=[2],
        text="",
        finished=True,
        reward=reward,
        log_probs=[0.0],
        iteration=iteration,
        candidate=candidate,
        selected=False,
    )


def group(id, rewards, iteration=0):
    return [rollout(id, number, reward, iteration) for number, reward in enumerate(rewards)]


def names(rollouts):
    return [(r.iteration, r.prompt.id, r.candidate) for r in rollouts]


class TestChoose:
    ROLLOUTS = (*group("a", [0, 3, 3, 1]), *group("b", [-1, -2]), *group("a", [5, 6], 1))

    def test_best(self):
        """Of every prompt and iteration; the lower number of equals."""
        assert names(choose(self.ROLLOUTS, "best")) == [(0, "a", 1), (0, "b", 0), (1, "a", 1)]

    def test_all(self):
        assert names(choose(self.ROLLOUTS, "all")) == names(self.ROLLOUTS)

    def test_one_is_a_draw_from_every_group(self):
        rollouts = [r for i in range(600) for r in group(f"p{i}", [0, 0, 0])]
        drawn = choose(rollouts, "one", seed=3)
        assert [r.prompt.id for r in drawn] == [f"p{i}" for i in range(600)]
        counts = np.bincount([r.candidate for r in drawn], minlength=3)
        assert abs(counts - 200).max() < 4 * np.sqrt(600 * 2 / 9)
        assert names(drawn) != names(choose(rollouts, "one", seed=4))

    @pytest.mark.parametrize("which", ["best", "all", "one"])
    def test_does_not_depend_on_the_order_of_storage(self, which):
        shuffled = list(self.ROLLOUTS)
        random.Random(0).shuffle(shuffled)
        assert sorted(names(choose(shuffled, which))) == sorted(names(choose(self.ROLLOUTS, which)))

    def test_one_does_not_depend_on_the_other_prompts(self):
        alone = choose(group("a", [0, 0, 0, 0]), "one", seed=1)
        among = choose([*group("b", [0, 0]), *group("a", [0, 0, 0, 0])], "one", seed=1)
        assert names(alone) == names(among)[1:]

    def test_mixed_only(self):
        rollouts = [*group("a", [1, 1]), *group("b", [0, 1]), *group("c", [0, 0]), *group("d", [1])]
        assert names(choose(rollouts, "all", mixed_only=True)) == [(0, "b", 0), (0, "b", 1)]
        assert names(choose(rollouts, "best", mixed_only=True)) == [(0, "b", 1)]
        with pytest.raises(ValueError, match="none among 2"):
            choose([*group("a", [1, 1]), *group("c", [0, 0])], mixed_only=True)
        with pytest.raises(ValueError, match=r"0 or 1\. Got: \[0\.5\]"):
            choose(group("a", [0.5, 1]), mixed_only=True)

    def test_unknown(self):
        with pytest.raises(ValueError, match="Got: 'worst'"):
            choose(self.ROLLOUTS, "worst")


class TestSplit:
    ROLLOUTS = tuple(r for i in range(400) for r in group(f"p{i}", [0, 1]))

    def test_never_splits_a_prompt(self):
        train, held_out = split_by_prompt(self.ROLLOUTS, 0.25, seed=0)
        assert not {r.prompt.id for r in train} & {r.prompt.id for r in held_out}
        assert sorted(names([*train, *held_out])) == sorted(names(self.ROLLOUTS))
        share = len(held_out) / len(self.ROLLOUTS)
        assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 400)

    def test_a_prompt_stays_on_its_side_in_every_iteration(self):
        _, held_out = split_by_prompt(self.ROLLOUTS, 0.25, seed=0)
        _, of_some = split_by_prompt(self.ROLLOUTS[:200][::-1], 0.25, seed=0)
        assert set(names(of_some)) == set(names(held_out)) & set(names(self.ROLLOUTS[:200]))
        _, other_seed = split_by_prompt(self.ROLLOUTS, 0.25, seed=1)
        assert names(other_seed) != names(held_out)

    @pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
    def test_no_side_is_empty(self, fraction):
        for seed in range(5):
            train, held_out = split_by_prompt(self.ROLLOUTS[:4], fraction, seed)
            assert len(train) == len(held_out) == 2

    def test_impossible_splits(self):
        with pytest.raises(ValueError, match="two prompts"):
            split_by_prompt(self.ROLLOUTS[:2], 0.5, seed=0)
        for fraction in (0, 1, -1, 2):
            with pytest.raises(ValueError, match="fraction"):
                split_by_prompt(self.ROLLOUTS, fraction, seed=0)


class TestBatches:
    EXAMPLES = tuple(
        {"index": np.int32(i), "tokens": np.full((4,), i, np.int32), "mask": np.ones(4, bool)}
        for i in range(10)
    )

    def indices(self, **options):
        options = {"batch_size": 3, "seed": 0, **options}
        found = []
        for batch in batches(options.pop("examples", self.EXAMPLES), **options):
            assert batch["tokens"].shape == (len(batch["index"]), 4)
            assert batch["mask"].dtype == bool
            assert (batch["tokens"] == batch["index"][:, None]).all()
            found.append(batch["index"].tolist())
        return found

    def test_every_epoch_has_every_example_once_in_another_order(self):
        order = [index for batch in self.indices(num_epochs=3) for index in batch]
        epochs = [order[:10], order[10:20], order[20:]]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]

    def test_the_order_depends_on_the_seed_only(self):
        assert self.indices(num_epochs=2) == self.indices(num_epochs=2)
        assert self.indices(num_epochs=2) != self.indices(num_epochs=2, seed=2**40)

    @pytest.mark.parametrize("count", [1, 2, 5, 10])
    @pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 16])
    @pytest.mark.parametrize("num_epochs", [1, 2])
    @pytest.mark.parametrize("drop_remainder", [False, True])
    def test_sizes_and_their_number(self, count, batch_size, num_epochs, drop_remainder):
        options = {
            "batch_size": batch_size,
            "num_epochs": num_epochs,
            "drop_remainder": drop_remainder,
        }
        sizes = [len(b) for b in self.indices(examples=self.EXAMPLES[:count], **options)]
        assert len(sizes) == num_batches(count, **options) >= 1
        total = count * num_epochs
        assert all(size == batch_size for size in sizes[:-1])
        if drop_remainder:
            assert sizes[-1] == batch_size
        else:
            assert sum(sizes) == total

    def test_endless(self):
        assert num_batches(10, batch_size=4, num_epochs=None) is None
        iterator = batches(self.EXAMPLES, batch_size=4, num_epochs=None, seed=0)
        assert [next(iterator)["index"].size for _ in range(50)] == [4] * 50

    @pytest.mark.parametrize("done", [0, 1, 4, 9])
    def test_a_restored_iterator_goes_on_exactly(self, done):
        def start():
            return batches(self.EXAMPLES, batch_size=3, num_epochs=3, seed=5)

        first = start()
        for _ in range(done):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        expected = [batch["index"].tolist() for batch in first]
        assert len(expected) == 10 - done
        restored = start()
        restored.set_state(state)
        assert [batch["index"].tolist() for batch in restored] == expected

    @pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"num_epochs": 0}, {"examples": ()}])
    def test_impossible_sizes(self, wrong):
        with pytest.raises(ValueError, match="at least 1"):
            self.indices(**wrong)
