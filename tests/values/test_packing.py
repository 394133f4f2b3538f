"""Several rollouts in a row: the same losses, gradients and fits, with less padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iro_jax.models import Network
from iro_jax.models.config import Layer
from iro_jax.models.lora import init_adapters
from iro_jax.models.rope import Rope
from iro_jax.testing import tiny_config
from iro_jax.values import FitSettings, Head, ValueNetwork, ValueParams, fit, new_head
from iro_jax.values.fit import planned_batches
from iro_jax.values.function import with_adapters
from iro_jax.values.objectives import ValueObjective, state_examples, token_examples
from iro_jax.values.packing import Packing, packing_for
from tests.conftest import OPTIMISED
from tests.values import cases
from tests.values.test_fit import Killed, kill_after, same

MODEL = cases.model()
ROLLOUTS = cases.rollouts(4, 3)
READINGS = [(rollout.prompt_tokens, rollout.tokens) for rollout in ROLLOUTS]
REWARDS = [rollout.reward for rollout in ROLLOUTS]
TARGETS = [np.cos(np.arange(len(answer) + 1)).astype(np.float32) for _, answer in READINGS]
WEIGHT = np.array([1, 2, 0, 1, 1, 3, 1, 0, 1, 1, 2, 1], np.float32)
SETTINGS = FitSettings(learning_rate=0.01, batch_size=8, micro_batches=2, num_epochs=3, patience=3)


def stack(examples, **changes):
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]} | changes


def examples_of(length=32):
    return token_examples(READINGS, REWARDS, TARGETS, length=length)


def packed_by(examples, batch, slots):
    """With as few rows as the batch needs, in one part."""
    lengths = np.where(batch["weight"] != 0, batch["mask"].sum(1), 0)
    for rows in range(1, len(lengths) + 1):
        try:
            return Packing(rows, slots)(batch)
        except ValueError:
            continue
    raise AssertionError(slots)


def differentiate(objective, params, batch):
    trainable = objective.initial(params)
    return jax.jit(jax.value_and_grad(objective))(trainable, objective.frozen(params), batch)


def assert_same_gradient(found, want):
    """To 1e-5 of its length."""
    length = float(optax.global_norm(want))
    assert length > 0.01
    assert float(optax.global_norm(jax.tree.map(jnp.subtract, found, want))) < 1e-5 * length


def smaller(function):
    """With a backbone of usual weights, so that rounding is not amplified."""
    backbone = jax.tree.map(lambda x: x / 4, function.params.backbone)
    return function.with_params(dataclasses.replace(function.params, backbone=backbone))


def moved_adapters(function):
    """With adapters that change something."""
    function = with_adapters(function, rank=2, seed=0)
    adapters = jax.tree.map(lambda x: x + 0.01, function.params.adapters)
    return function.with_params(dataclasses.replace(function.params, adapters=adapters))


class TestLosses:
    @pytest.mark.parametrize("slots", [16, 64])
    @pytest.mark.parametrize(
        ("loss", "trainable", "head"),
        [
            ("monte_carlo", "all", None),
            ("compression", "all", Head((4,))),
            ("td_lambda", "all", None),
            ("gae", "adapters", Head()),
            ("verifiable", "adapters", Head(output="sigmoid")),
            ("categorical", "head", Head(output="categorical", num_atoms=5)),
        ],
    )
    def test_packed_rollouts_have_the_loss_and_the_gradient_of_padded_ones(
        self, loss, trainable, head, slots
    ):
        function = smaller(cases.score_function() if head is None else new_head(MODEL, head))
        if trainable == "adapters":
            function = moved_adapters(function)
        objective = ValueObjective(function.network, loss, trainable, gamma=0.9, lam=0.7)
        batch = stack(examples_of(), weight=WEIGHT)
        packed = packed_by(examples_of(), batch, slots)
        assert packed["tokens"].size < batch["tokens"].size / 2
        want_loss, want = differentiate(objective, function.params, batch)
        found_loss, found = differentiate(objective, function.params, packed)
        assert float(found_loss) == pytest.approx(float(want_loss), rel=1e-5)
        assert_same_gradient(found, want)

    @pytest.mark.parametrize("loss", ["monte_carlo", "td_lambda", "cdq"])
    def test_hidden_states_without_padding(self, loss):
        rng = np.random.default_rng(0)
        states = [
            rng.normal(size=(len(answer) + 1, 16)).astype(np.float32) for _, answer in READINGS
        ]
        after = [
            (rng.normal(size=(len(x), 3, 16)).astype(np.float32), rng.dirichlet([1] * 3, len(x)))
            for x in states
        ]
        following = after if loss == "cdq" else None
        batch = stack(state_examples(states, REWARDS, None, following, length=12), weight=WEIGHT)
        function = new_head(MODEL, Head((4,)))
        objective = ValueObjective(function.network, loss)
        count = sum(len(x) for x, weight in zip(states, WEIGHT, strict=True) if weight)
        packed = Packing(1, count)(batch)
        assert packed["states"].shape == (1, count, 16)
        want_loss, want = differentiate(objective, function.params, batch)
        found_loss, found = differentiate(objective, function.params, packed)
        assert float(found_loss) == pytest.approx(float(want_loss), rel=1e-5)
        assert_same_gradient(found, want)


class TestSegments:
    """One network pass over rows of several sequences, against a pass for each alone."""

    @staticmethod
    def rows(sequences, length=40):
        """Two rows, with padding between and behind sequences."""
        tokens = np.full((2, length), 7, np.int32)
        segments = np.zeros((2, length), np.int32)
        places = []
        used = [0, 3]
        for number, sequence in enumerate(sequences, 1):
            row = number % 2
            place = slice(used[row], used[row] + len(sequence))
            tokens[row, place], segments[row, place] = sequence, number
            used[row] += len(sequence) + (number == 3)
            places.append((row, place))
        return tokens, segments, places

    @pytest.mark.parametrize("window", [None, 3])
    def test_hidden_states_are_those_of_each_sequence_alone(self, window):
        layers = (Layer(Rope(10000.0, 8), window), Layer(Rope(10000.0, 8)))
        network = Network(tiny_config(layers=layers, head="score"))
        params = jax.tree.map(lambda x: 8 * x, network.init(jax.random.key(0)))
        # Weights so large that the rounding of programs that are not optimised would show.
        forward = jax.jit(network.forward, compiler_options=OPTIMISED)
        rng = np.random.default_rng(0)
        sequences = [rng.integers(0, 64, n) for n in (5, 9, 1, 7, 12)]
        tokens, segments, places = self.rows(sequences)
        found = forward(params, tokens, segments > 0, segments=segments).score
        for sequence, place in zip(sequences, places, strict=True):
            # Of as many slots as the rows are long: the same kernels compute both.
            padded = np.zeros((1, tokens.shape[1]), int)
            padded[0, : len(sequence)] = sequence
            alone = forward(params, padded, np.arange(padded.size)[None] < len(sequence))
            alone_score = alone.score[0, : len(sequence)]
            np.testing.assert_allclose(found[place], alone_score, atol=1e-5)

    def test_with_an_adapter_for_each_of_several_value_functions(self):
        network = ValueNetwork(MODEL.network, Head(), num_values=2, adapters=True)
        adapters = init_adapters(MODEL.network.config, jax.random.key(1), copies=2, rank=2)
        adapters = jax.tree.map(lambda x: x + 0.02, adapters)
        params = ValueParams(MODEL.params, Head().init(jax.random.key(2), 16, 2), adapters)
        sequences = [np.concatenate(reading) for reading in READINGS[:4]]
        tokens, segments, places = self.rows(sequences)
        forward = jax.jit(network.forward)
        found = forward(params, tokens, segments > 0, segments=segments)
        for sequence, place in zip(sequences, places, strict=True):
            alone = forward(params, sequence[None], np.ones((1, len(sequence)), bool))
            assert np.ptp(alone[0], axis=-1).max() > 1e-2
            np.testing.assert_allclose(found[place], alone[0], atol=1e-5)

    def test_no_sequence_sees_another(self):
        function = cases.score_function()
        forward = jax.jit(function.network.forward)
        sequences = [np.concatenate(reading) for reading in READINGS[:4]]
        tokens, segments, places = self.rows(sequences)
        want = np.asarray(forward(function.params, tokens, segments > 0, segments=segments))
        for changed in range(4):
            other = np.where(segments == changed + 1, (tokens + 11) % cases.VOCABULARY, tokens)
            found = forward(function.params, other, segments > 0, segments=segments)
            same_values = np.asarray(found) == want
            for number, place in enumerate(places):
                assert np.all(same_values[place]) == (number != changed)


class TestFits:
    @staticmethod
    def run(folder, *, packed, **options):
        rollouts = cases.rollouts(8, 3)
        readings = [(rollout.prompt_tokens, rollout.tokens) for rollout in rollouts]
        examples = token_examples(readings, [rollout.reward for rollout in rollouts], length=32)
        train, held_out = examples[:19], examples[19:]
        function = smaller(cases.score_function())
        objective = ValueObjective(function.network, "td_lambda", "all")
        packing = packing_for(function.network.network.config, train, held_out, SETTINGS)
        return fit(
            objective,
            objective.initial(function.params),
            objective.frozen(function.params),
            train,
            held_out,
            SETTINGS,
            folder=folder,
            arrange=packing if packed else None,
            count=functools.partial(objective.work, function.params),
            **options,
        )

    def test_a_fit_is_the_same_and_compiles_once(self, tmp_path, caplog):
        padded = self.run(tmp_path / "padded", packed=False)
        with jax.log_compiles():
            packed = self.run(tmp_path / "packed", packed=True)
        programs = [record.getMessage() for record in caplog.records]
        for name in ("update", "evaluate"):
            assert sum(f"Compiling jit({name})" in message for message in programs) == 1
        for found, want in zip(packed.curve, padded.curve, strict=True):
            assert found.held_out_loss == pytest.approx(want.held_out_loss, rel=1e-4)
            assert found.train_loss == pytest.approx(want.train_loss, rel=1e-4)
        assert packed.curve[-1].train_loss < 0.9 * packed.curve[1].train_loss
        tokens, slots = (
            [line.throughput.work for line in found.curve[1:]] for found in (packed, padded)
        )
        assert [x.tokens for x in tokens] == [x.tokens for x in slots]
        assert [x.flops for x in tokens] == [x.flops for x in slots]
        assert sum(x.slots for x in tokens) < 0.7 * sum(x.slots for x in slots)

    def test_an_interrupted_fit_ends_like_one_that_was_not(self, tmp_path):
        whole = self.run(tmp_path / "whole", packed=True)
        with pytest.raises(Killed):
            self.run(tmp_path / "killed", packed=True, on_epoch=kill_after(1))
        again = self.run(tmp_path / "killed", packed=True)
        assert again.curve == whole.curve
        assert same(again.params, whole.params)


@pytest.mark.usefixtures("xla_alone")
@pytest.mark.parametrize("trainable", ["all", "adapters", "head"])
def test_the_work_of_an_update_is_what_xla_counts(trainable):
    function = new_head(cases.model(width=512), Head())
    if trainable == "adapters":
        function = moved_adapters(function)
    objective = ValueObjective(function.network, trainable=trainable)
    words = np.arange(64, dtype=np.int32) % cases.VOCABULARY
    batch = stack(token_examples([(words[:5], words[5:])] * 2, [1.0, 2.0], length=64))
    found = objective.work(function.params, batch)
    program = jax.jit(jax.value_and_grad(objective)).lower(
        objective.initial(function.params), objective.frozen(function.params), batch
    )
    assert (found.tokens, found.slots) == (128, 128)
    assert found.flops == pytest.approx(program.compile().cost_analysis()["flops"], rel=0.1)


class TestPacking:
    @pytest.mark.parametrize("longest", [64, 512])
    def test_uneven_rollouts_waste_little(self, longest):
        rng = np.random.default_rng(0)
        prompts = rng.integers(8, longest // 4, 400)
        answers = np.minimum(rng.lognormal(np.log(longest / 6), 0.8, 400), 3 * longest // 4)
        readings = [
            (np.ones(prompt, int), np.ones(int(answer) + 1, int))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        examples = token_examples(readings, [0.0] * 400, length=2 * longest)
        settings = FitSettings(batch_size=64, num_epochs=4)
        packing = packing_for(tiny_config(), examples[:360], examples[360:], settings)
        batches = list(planned_batches(examples[:360], examples[360:], settings))
        packed = [packing(batch) for batch in batches]
        assert {x["tokens"].shape for x in packed} == {(packing.rows, packing.slots)}
        real = np.sum([batch["mask"].sum() for batch in batches[:-1]])
        longest_row = max(batch["mask"].sum(1).max() for batch in batches)
        of_padded = real / (len(batches[:-1]) * 64 * longest_row)
        of_packed = real / np.sum([x["mask"].size for x in packed[:-1]])
        assert of_padded < 0.55
        assert of_packed > 0.85

    def test_rows_hold_the_rollouts_side_by_side(self):
        lengths = [6, 2, 4, 3]
        readings = [(np.full(1, i), np.full(n - 1, i)) for i, n in enumerate(lengths, 1)]
        packed = Packing(2, 8)(stack(token_examples(readings, [0.0] * 4, length=8)))
        assert packed["tokens"].tolist() == [[1, 1, 1, 1, 1, 1, 2, 2], [3, 3, 3, 3, 4, 4, 4, 0]]
        assert packed["segments"].tolist() == packed["tokens"].tolist()
        assert packed["first"].tolist() == [0, 6, 8, 12]
        assert packed["lengths"].tolist() == lengths

    def test_each_part_is_packed_by_itself(self):
        batch = stack(examples_of(), weight=WEIGHT)
        whole = Packing(4, 64, parts=3)(batch)
        for number in range(3):
            place = slice(4 * number, 4 * (number + 1))
            part = Packing(4, 64)({name: x[place] for name, x in batch.items()})
            assert np.array_equal(whole["tokens"][place], part["tokens"])
            assert np.array_equal(whole["first"][place], part["first"])

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match=r"fit into 1 rows of 16 slots. Got: "):
            Packing(1, 16)(stack(examples_of()))
