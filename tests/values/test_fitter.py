"""From stored rollouts to value functions: all ways to train them, and compression (10)."""

import dataclasses

import jax
import numpy as np
import pytest

from iro_jax.values import (
    FitSettings,
    Head,
    StateCache,
    ValueFitter,
    ValueSettings,
    new_head,
)
from tests.values import cases

MODEL = cases.model()
ROLLOUTS = cases.rollouts()
TRAIN, HELD_OUT = ROLLOUTS[:12], ROLLOUTS[12:]
LINEAR = Head()
BARE = Head(bias=False)
FIT = FitSettings(learning_rate=0.03, batch_size=6, num_epochs=3)
HEAD = ValueSettings(trainable="head", head=LINEAR, layer=1, fit=FIT)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return cases.store(tmp_path_factory.mktemp("rollouts"), ROLLOUTS)


def fitter(settings, *, states=True):
    cache = StateCache(MODEL, settings.layer) if states else None
    return ValueFitter(settings, cases.answer_tokens(), states=cache)


def leaves(tree):
    return [np.asarray(x).copy() for x in jax.tree.leaves(tree)]


def all_values(function, rollouts=ROLLOUTS):
    return [cases.whole_values(function, r.prompt_tokens, r.tokens) for r in rollouts]


def mean_loss(function, rollouts=HELD_OUT):
    """Of regression on the final reward (7)."""
    values = all_values(function, rollouts)
    pairs = zip(values, rollouts, strict=True)
    return np.mean([np.sum((v - rollout.reward) ** 2) for v, rollout in pairs])


def assert_near(found, want, atol):
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


class TestHeads:
    @pytest.mark.parametrize("head", [LINEAR, BARE, Head((4,), output="sigmoid")])
    def test_fitted_to_states_a_head_reads_the_backbone_itself(self, head, store, tmp_path):
        settings = dataclasses.replace(HEAD, head=head)
        start = new_head(MODEL, head, layer=1, source="the policy")
        found = fitter(settings)(start, [store], TRAIN, HELD_OUT, folder=tmp_path)
        assert found.curve[found.best_epoch].held_out_loss < 0.9 * found.curve[0].held_out_loss
        # The scale of the states is in the head: its own values have the loss of the fit.
        losses = [
            np.sum((values - rollout.reward) ** 2)
            for values, rollout in zip(all_values(found.function, HELD_OUT), HELD_OUT, strict=True)
        ]
        best = found.curve[found.best_epoch].held_out_loss
        assert np.mean(losses) == pytest.approx(best, rel=1e-3)
        assert found.function.frozen
        assert found.function.source == "the policy"
        assert found.epochs == 3
        assert found.prefixes == sum(len(rollout.tokens) + 1 for rollout in TRAIN)
        whole = [len(rollout.prompt_tokens) + len(rollout.tokens) for rollout in TRAIN]
        assert found.lengths.tolist() == whole

    def test_the_fit_starts_at_the_function_that_it_is_given(self, store, tmp_path):
        start = new_head(MODEL, Head((4,)), layer=1, seed=5)
        settings = dataclasses.replace(HEAD, head=None)
        found = fitter(settings)(start, [store], TRAIN, HELD_OUT, folder=tmp_path)
        assert found.curve[0].held_out_loss == pytest.approx(mean_loss(start), rel=1e-3)

    def test_a_head_of_another_shape_replaces_the_one_before(self, store, tmp_path):
        start = new_head(MODEL, Head((4,)), layer=1)
        settings = dataclasses.replace(HEAD, head=Head(output="categorical"), loss="categorical")
        found = fitter(settings)(start, [store], TRAIN, HELD_OUT, folder=tmp_path)
        assert found.function.network.head == Head(output="categorical")
        values = np.concatenate(all_values(found.function))
        assert np.all((values > 0) & (values < 1))
        assert found.best_epoch > 0

    def test_without_its_states_the_same_head_is_fitted_to_tokens(self, store, tmp_path):
        start = new_head(MODEL, LINEAR, layer=1)
        found = fitter(HEAD, states=False)(start, [store], TRAIN, HELD_OUT, folder=tmp_path)
        assert found.function.frozen
        best = found.curve[found.best_epoch].held_out_loss
        assert best < found.curve[0].held_out_loss

    @pytest.mark.parametrize("states", [True, False])
    def test_values_at_every_prefix_of_stored_rollouts(self, states, store):
        function = new_head(MODEL, Head((4,)), layer=1)
        shuffled = [ROLLOUTS[i] for i in np.random.default_rng(0).permutation(len(ROLLOUTS))]
        found = fitter(HEAD, states=states).values(function, [store], shuffled)
        assert_near(found, all_values(function, shuffled), atol=1e-5)


class TestNormalisation:
    def test_rewards_of_another_scale_give_the_same_values_on_that_scale(self, tmp_path):
        settings = dataclasses.replace(HEAD, normalise=True)
        start = new_head(MODEL, LINEAR, layer=1, seed=3)
        head = LINEAR.fold(start.params.head, 100.0, 10.0)
        scaled = [dataclasses.replace(r, reward=100 + 10 * r.reward) for r in ROLLOUTS]
        found = []
        for name, rollouts, params in (
            ("plain", ROLLOUTS, start.params),
            ("scaled", scaled, dataclasses.replace(start.params, head=head)),
        ):
            fitted = fitter(settings)(
                start.with_params(params),
                [cases.store(tmp_path / name / "rollouts", rollouts)],
                rollouts[:12],
                rollouts[12:],
                folder=tmp_path / name,
            )
            assert fitted.best_epoch > 0
            found.append(all_values(fitted.function))
        plain, large = found
        assert_near(large, [100 + 10 * values for values in plain], atol=1e-2)

    def test_a_start_on_the_scale_of_the_reward_stays_on_it(self, store, tmp_path):
        """Standardised or not, a fit that learns nothing gives back what it started from."""
        start = new_head(MODEL, LINEAR, layer=1, seed=3)
        still = dataclasses.replace(FIT, learning_rate=1e-12)
        settings = dataclasses.replace(HEAD, normalise=True, fit=still)
        found = fitter(settings)(start, [store], TRAIN, HELD_OUT, folder=tmp_path)
        assert_near(all_values(found.function), all_values(start), atol=1e-4)

    def test_what_cannot_be_rescaled_is_refused(self, store, tmp_path):
        settings = dataclasses.replace(HEAD, normalise=True)
        for head, message in (
            (BARE, "without a bias"),
            (Head(output="sigmoid"), "Only identity outputs"),
        ):
            chosen = dataclasses.replace(settings, head=head)
            with pytest.raises(ValueError, match=message):
                fitter(chosen)(
                    new_head(MODEL, head, layer=1), [store], TRAIN, HELD_OUT, folder=tmp_path
                )
        same = [dataclasses.replace(rollout, reward=0.5) for rollout in TRAIN]
        with pytest.raises(ValueError, match=r"must differ. Got: 0.5 for all 12"):
            fitter(settings)(
                new_head(MODEL, LINEAR, layer=1), [store], same, HELD_OUT, folder=tmp_path
            )


@pytest.mark.slow
class TestBackbones:
    def test_adapters_are_trained_on_a_backbone_that_stays(self, store, tmp_path):
        start = new_head(MODEL, LINEAR)
        settings = ValueSettings(trainable="adapters", rank=2, fit=FIT)
        fit_adapters = fitter(settings, states=False)
        found = fit_adapters(start, [store], TRAIN, HELD_OUT, folder=tmp_path / "0")
        assert found.function.params.backbone is MODEL.params
        # Adapters change nothing at first: epoch 0 is the function it started from.
        assert found.curve[0].held_out_loss == pytest.approx(mean_loss(start), rel=1e-3)
        assert found.curve[found.best_epoch].held_out_loss < found.curve[0].held_out_loss
        for layer in found.function.params.adapters:
            assert all(np.abs(adapter.up).max() > 1e-3 for adapter in layer.values())
        again = fit_adapters(found.function, [store], TRAIN, HELD_OUT, folder=tmp_path / "1")
        start_of_second = again.curve[0].held_out_loss
        assert start_of_second == pytest.approx(
            found.curve[found.best_epoch].held_out_loss, rel=1e-3
        )

    def test_everything_is_trained_in_bf16_with_weights_in_f32(self, store, tmp_path):
        start = cases.score_function()
        before, exact = leaves(start.params), mean_loss(start)
        # Steps that bf16 weights would round away, and gains above the loss's own rounding.
        small = dataclasses.replace(FIT, learning_rate=3e-5, num_epochs=2)
        settings = ValueSettings(dtype="bfloat16", fit=small)
        fit_all = fitter(settings, states=False)
        found = fit_all(start, [store], TRAIN, HELD_OUT, folder=tmp_path)
        assert found.curve[0].held_out_loss != pytest.approx(exact, rel=1e-5)
        assert found.curve[0].held_out_loss == pytest.approx(exact, rel=0.05)
        assert found.best_epoch > 0
        assert not found.function.frozen
        assert found.function.network == start.network
        for old, new, kept in zip(
            before, leaves(found.function.params), leaves(start.params), strict=True
        ):
            np.testing.assert_array_equal(kept, old)
            assert new.dtype == np.float32
            assert 0 < np.abs(new - old).max() < 1e-4


class TestCompression:
    BETAS = (1.0, 2.0, 2.5)

    def sums(self, functions):
        each = [all_values(function) for function in functions]
        return [
            sum(v / beta for v, beta in zip(values, self.BETAS, strict=True))
            for values in zip(*each, strict=True)
        ]

    @pytest.mark.parametrize("head", [LINEAR, BARE])
    def test_linear_heads_are_compressed_exactly(self, head, store, tmp_path):
        functions = [new_head(MODEL, head, layer=1, seed=seed) for seed in range(3)]
        want = self.sums(functions)
        exact = FitSettings(learning_rate=0.1, batch_size=6, num_epochs=3, clip_norm=1e6)
        settings = dataclasses.replace(HEAD, head=head, compression=exact)
        found = fitter(settings).compress(
            functions, self.BETAS, [store], TRAIN * 100, HELD_OUT, folder=tmp_path
        )
        deviation = np.std(np.concatenate(want))
        assert deviation > 0.01
        assert_near(all_values(found.function), want, atol=1e-3 * deviation)
        assert found.curve[0].held_out_loss > 100 * found.curve[-1].held_out_loss

    def test_values_that_end_at_one_are_summed_to_more(self, store, tmp_path):
        head = Head(output="sigmoid")
        functions = [new_head(MODEL, head, layer=1, seed=seed) for seed in range(3)]
        settings = dataclasses.replace(HEAD, head=head, loss="verifiable", compression=FIT)
        found = fitter(settings).compress(
            functions, (0.1, 0.1, 0.1), [store], TRAIN, HELD_OUT, folder=tmp_path
        )
        assert found.function.network.head.output == "identity"
        assert np.mean(np.concatenate(all_values(found.function))) > 5


@pytest.mark.parametrize(
    "wrong", [{"loss": "mse"}, {"trainable": "top"}, {"dtype": "float16"}, {"rank": 0}]
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be .*Got: "):
        ValueSettings(**wrong)
