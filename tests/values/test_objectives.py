"""Losses of whole value functions: what they are of a batch, and which weights they move."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.values import Head, ValueNetwork, new_head, with_adapters
from iro_jax.values.objectives import ValueObjective, state_examples, token_examples
from iro_jax.values.reading import StateReader
from tests.values import cases

MODEL = cases.model()
ROLLOUTS = cases.rollouts(2, 3)
READINGS = [(rollout.prompt_tokens, rollout.tokens) for rollout in ROLLOUTS]
REWARDS = [rollout.reward for rollout in ROLLOUTS]


def batch_of(examples, **changes):
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]} | changes


def states_of(layer):
    reader = StateReader(MODEL.network, "hidden" if layer is None else layer, rows=2, answers=4)
    groups = [(prompt, [answer]) for prompt, answer in READINGS]
    return [x for group in reader(MODEL.params, groups) for x in group]


def differentiate(objective, params, batch):
    trainable = objective.initial(params)
    return jax.jit(jax.value_and_grad(objective))(trainable, objective.frozen(params), batch)


def changed(tree):
    """The largest gradient of every leaf."""
    return [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)]


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), a, b)


class TestExamples:
    def test_prefixes_run_from_the_bare_prompt_to_the_complete_answer(self):
        examples = token_examples(READINGS, REWARDS, length=32)
        for example, rollout in zip(examples, ROLLOUTS, strict=True):
            asked, answered = len(rollout.prompt_tokens), len(rollout.tokens)
            whole = [*rollout.prompt_tokens, *rollout.tokens]
            assert example["tokens"][example["mask"]].tolist() == whole
            assert np.flatnonzero(example["prefixes"]).tolist() == [
                *range(asked - 1, asked + answered)
            ]
            last = example["tokens"][np.flatnonzero(example["prefixes"])[-1]]
            assert (last == cases.EOS) == rollout.finished
            assert example["reward"] == np.float32(rollout.reward)

    def test_padding_never_counts(self):
        function = new_head(MODEL, Head((4,)))
        objective = ValueObjective(function.network)
        examples = token_examples(READINGS, REWARDS, length=32)
        batch = batch_of(examples)
        other = np.where(batch["mask"], batch["tokens"], 17)
        filler = batch | {"weight": np.array([1, 1, 1, 0, 1, 0], np.float32)}
        broken = filler | {"reward": np.where(filler["weight"], batch["reward"], np.nan)}
        want = differentiate(objective, function.params, batch)
        longer = batch_of(token_examples(READINGS, REWARDS, length=40))
        assert_close(differentiate(objective, function.params, longer), want, 1e-4)
        assert_close(differentiate(objective, function.params, batch | {"tokens": other}), want, 0)
        assert_close(
            differentiate(objective, function.params, broken),
            differentiate(objective, function.params, filler),
            0,
        )

    def test_a_rollout_that_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match=r"fit into 4 places. Got: "):
            token_examples(READINGS, REWARDS, length=4)


@pytest.mark.parametrize(
    ("loss", "head", "layer"),
    [
        ("monte_carlo", Head((4,)), None),
        ("categorical", Head(output="categorical", num_atoms=5), 1),
        ("compression", Head(bias=False), None),
    ],
)
def test_a_head_learns_from_states_what_it_learns_from_tokens(loss, head, layer):
    function = new_head(MODEL, head, layer=layer)
    states = states_of(layer)
    targets = [np.sin(np.arange(len(x))).astype(np.float32) for x in states]
    targets = targets if loss == "compression" else None
    objective = ValueObjective(function.network, loss)
    of_states = state_examples(states, REWARDS, targets, length=10)
    of_tokens = token_examples(READINGS, REWARDS, targets, length=32)
    a = differentiate(objective, function.params, batch_of(of_states))
    b = differentiate(objective, function.params, batch_of(of_tokens))
    assert min(changed(b)) > 1e-3
    assert_close(a, b, 1e-4)


class TestLosses:
    """Against sums over prefixes in plain Python."""

    @staticmethod
    def compute(loss, head, of_prefix, **options):
        """The loss, and what `of_prefix(logits, reward, rollout)` sums to, a rollout at a time."""
        function = new_head(MODEL, head)
        states = states_of(None)
        kernel = np.asarray(function.params.head[0]["kernel"][0], np.float64) * 20
        params = {"head": ({"kernel": jnp.asarray(kernel, jnp.float32)[None]},)}
        targets = [np.cos(np.arange(len(x))).astype(np.float32) for x in states]
        weight = np.array([1, 2, 0, 1, 1, 3], np.float32)
        batch = batch_of(state_examples(states, REWARDS, targets, length=10), weight=weight)
        objective = ValueObjective(function.network, loss, **options)
        found = objective(params, None, batch)
        each = zip(states, REWARDS, targets, strict=True)
        sums = [of_prefix(np.asarray(x, np.float64) @ kernel, r, t) for x, r, t in each]
        assert np.std(sums) > 0.1
        return float(found), np.average(sums, weights=weight)

    def test_monte_carlo(self):
        found, want = self.compute(
            "monte_carlo", Head(bias=False), lambda v, r, _: np.sum((v[:, 0] - r) ** 2)
        )
        assert found == pytest.approx(want, rel=1e-4)

    def test_verifiable(self):
        def cross_entropy(logits, r, _):
            v = 1 / (1 + np.exp(-logits[:, 0]))
            return -np.sum(r * np.log(v) + (1 - r) * np.log(1 - v))

        head = Head(bias=False, output="sigmoid")
        found, want = self.compute("verifiable", head, cross_entropy)
        assert found == pytest.approx(want, rel=1e-4)

    def test_categorical(self):
        head = Head(bias=False, output="categorical", num_atoms=3, support=(0.0, 1.0))

        def cross_entropy(logits, r, _):
            probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            below, above = math.floor(2 * r), math.ceil(2 * r)
            part = 2 * r - below
            return -np.sum(
                (1 - part) * np.log(probabilities[:, below])
                + part * np.log(probabilities[:, above])
            )

        found, want = self.compute("categorical", head, cross_entropy)
        assert found == pytest.approx(want, rel=1e-4)

    @pytest.mark.parametrize("loss", ["td_lambda", "gae"])
    def test_bootstrapped(self, loss):
        gamma, lam = 0.9, 0.7

        def squared(v, r, _):
            v, last, total = v[:, 0], len(v) - 1, 0.0
            for h in range(len(v)):
                # The lambda-return, written out as a mixture of n-step returns.
                if h >= last - 1:
                    target = r
                else:
                    steps = range(1, last - h)
                    target = sum((1 - lam) * lam ** (n - 1) * gamma**n * v[h + n] for n in steps)
                    target += lam ** (last - 1 - h) * gamma ** (last - 1 - h) * r
                total += (target - v[h]) ** 2
            return total

        options = {"gamma": gamma, "lam": lam}
        found, want = self.compute(loss, Head(bias=False), squared, **options)
        assert found == pytest.approx(want, rel=1e-4)

    def test_compression(self):
        found, want = self.compute(
            "compression", Head(bias=False), lambda v, _, t: np.sum((v[:, 0] - t) ** 2)
        )
        assert found == pytest.approx(want, rel=1e-4)

    def test_a_sigmoid_head_can_be_fitted_to_any_target(self):
        found, want = self.compute(
            "monte_carlo",
            Head(bias=False, output="sigmoid"),
            lambda z, r, _: np.sum((1 / (1 + np.exp(-z[:, 0])) - r) ** 2),
        )
        assert found == pytest.approx(want, rel=1e-4)


class TestWhatIsTrained:
    BATCH = batch_of(token_examples(READINGS, REWARDS, length=32))

    def test_a_head_alone(self):
        function = new_head(MODEL, Head((4,)))
        objective = ValueObjective(function.network)
        assert set(objective.initial(function.params)) == {"head"}
        assert objective.frozen(function.params) is MODEL.params
        _, gradient = differentiate(objective, function.params, self.BATCH)
        assert min(changed(gradient)) > 1e-4

    def test_adapters_of_every_projection_with_the_head(self):
        function = with_adapters(new_head(MODEL, Head()), rank=2, seed=0)
        objective = ValueObjective(function.network, trainable="adapters")
        trainable = objective.initial(function.params)
        assert set(trainable) == {"head", "adapters"}
        # `up` is zero to begin with, so that only it moves at first.
        _, gradient = differentiate(objective, function.params, self.BATCH)
        for layer in gradient["adapters"]:
            assert set(layer) == {"qkv", "output", "up", "down"}
            for adapter in layer.values():
                assert changed(adapter.up)[0] > 1e-5
                assert changed(adapter.down)[0] == 0

    def test_everything(self):
        function = cases.score_function()
        objective = ValueObjective(function.network, trainable="all")
        assert objective.frozen(function.params) is None
        _, gradient = differentiate(objective, function.params, self.BATCH)
        assert min(changed(gradient)) > 1e-5

    def test_layers_that_are_computed_again_give_the_same_gradient(self):
        function = with_adapters(new_head(MODEL, Head((4,))), rank=2, seed=0)
        once = ValueObjective(function.network, trainable="adapters")
        again = dataclasses.replace(once, remat=True)
        a = differentiate(once, function.params, self.BATCH)
        b = differentiate(again, function.params, self.BATCH)
        assert_close(a, b, 1e-4)
        program = jax.make_jaxpr(jax.grad(again))(
            again.initial(function.params), again.frozen(function.params), self.BATCH
        )
        assert "remat" in str(program)

    def test_what_was_trained_goes_back_in_the_types_it_had(self):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MODEL.params)
        function = new_head(dataclasses.replace(MODEL, params=params), Head())
        objective = ValueObjective(function.network, trainable="all")
        trained = jax.tree.map(
            lambda x: x.astype(jnp.float32) + 1, objective.initial(function.params)
        )
        combined = objective.combine(function.params, trained)
        types = jax.tree.map(lambda x: x.dtype, function.params)
        assert jax.tree.map(lambda x: x.dtype, combined) == types
        jax.tree.map(
            lambda new, old: np.testing.assert_allclose(
                np.float32(new), np.float32(old) + 1, rtol=1e-2
            ),
            combined,
            function.params,
        )


class TestErrors:
    @pytest.mark.parametrize(
        ("network", "options", "message"),
        [
            (ValueNetwork(MODEL.network, Head()), {"loss": "mse"}, "loss must be one of.*'mse'"),
            (ValueNetwork(MODEL.network, Head()), {"trainable": "top"}, "trainable.*'top'"),
            (ValueNetwork(MODEL.network, Head()), {"loss": "verifiable"}, "output='sigmoid'"),
            (
                ValueNetwork(MODEL.network, Head(output="sigmoid")),
                {"loss": "categorical"},
                "output='categorical'. Got: 'sigmoid'",
            ),
            (ValueNetwork(MODEL.network, Head()), {"trainable": "adapters"}, "Got: none"),
            (cases.score_function().network, {"trainable": "head"}, "Got: a score head"),
        ],
    )
    def test_objectives_that_make_no_sense(self, network, options, message):
        with pytest.raises(ValueError, match=message):
            ValueObjective(network, **options)
