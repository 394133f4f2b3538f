"""Heads: T small networks at once, against NumPy in f64, one head at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, softmax

from iro_jax.values.heads import Head, select, stack

WIDTH, COPIES, BATCH = 6, 3, (2, 4)

SHAPES = [
    Head(),
    Head((5, 4), bias=False),
    Head((5,), output="sigmoid"),
    Head(output="categorical", num_atoms=4, support=(-2.0, 1.0)),
    Head((5,), output="categorical"),
]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def drawn(head, seed=0, copies=COPIES):
    """Parameters of the right shapes with nothing small or zero about them."""
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), WIDTH, copies))
    return jax.tree.map(lambda leaf: jnp.asarray(normal(seed, *leaf.shape)), shapes)


def by_hand(params, t, features):
    """The last layer of head t, `[*batch, outputs]`."""
    x = np.asarray(features, np.float64)
    for index, layer in enumerate(params):
        x = x @ np.asarray(layer["kernel"][t], np.float64)
        if "bias" in layer:
            x += np.asarray(layer["bias"][t])
        if index < len(params) - 1:
            x = x * expit(x)
    return x


def value_by_hand(head, last):
    if head.output == "categorical":
        low, high = head.support
        atoms = [low + j * (high - low) / (head.num_atoms - 1) for j in range(head.num_atoms)]
        return softmax(last, axis=-1) @ np.array(atoms)
    return expit(last[..., 0]) if head.output == "sigmoid" else last[..., 0]


@pytest.mark.parametrize("head", SHAPES, ids=str)
def test_every_head_gives_what_it_gives_alone(head):
    params, shared, own = drawn(head), normal(1, *BATCH, WIDTH), normal(2, COPIES, *BATCH, WIDTH)

    @jax.jit
    def everything(params):
        alike = head(params, shared), head.logits(params, shared)
        return *alike, head.of_copies(params, own), head.logits_of_copies(params, own)

    values, logits, of_copies, logits_of_copies = everything(params)

    assert values.shape == of_copies.shape == (*BATCH, COPIES)
    atoms = (head.num_atoms,) if head.output == "categorical" else ()
    assert logits.shape == logits_of_copies.shape == (*BATCH, COPIES, *atoms)
    for t in range(COPIES):
        for features, of_t, raw in (
            (shared, values[..., t], logits[:, :, t]),
            (own[t], of_copies[..., t], logits_of_copies[:, :, t]),
        ):
            last = by_hand(params, t, features)
            np.testing.assert_allclose(raw, last if atoms else last[..., 0], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(of_t, value_by_hand(head, last), rtol=1e-4, atol=1e-5)


def test_computation_is_in_f32_whatever_is_handed_in():
    head = Head((5,), output="categorical")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn(head))
    features = normal(1, 2, WIDTH).astype(jnp.bfloat16)
    values = jax.jit(head)(half, features)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), half)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, jax.jit(head)(wide, features.astype(np.float32)), rtol=1e-6)


def test_atoms_are_even_and_reach_both_ends():
    head = Head(output="categorical", num_atoms=5, support=(-1.0, 3.0))
    assert head.atoms.tolist() == [-1, 0, 1, 2, 3]


def test_a_categorical_value_lies_in_the_support_and_is_sure_of_one_atom_if_its_logit_is_high():
    head = Head(output="categorical", num_atoms=5, support=(-1.0, 3.0))
    logits = 1e4 * jnp.eye(5)[:, None]
    np.testing.assert_array_equal(head.values(logits)[:, 0], head.atoms)
    assert head.values(jnp.zeros((1, 5))).tolist() == [1.0]


@pytest.mark.parametrize("hidden", [(), (5,)])
def test_folding_gives_values_of_the_reward_itself(hidden):
    head, features = Head(hidden), normal(1, *BATCH, WIDTH)
    params = drawn(head)
    folded = head.fold(params, mean=-3.5, std=0.25)
    np.testing.assert_allclose(
        head(folded, features), head(params, features) * 0.25 - 3.5, rtol=1e-5, atol=1e-6
    )


def test_a_head_without_bias_takes_the_scale_alone():
    head, features = Head((5,), bias=False), normal(1, WIDTH)
    params = drawn(head)
    np.testing.assert_allclose(
        head(head.fold(params, mean=0.0, std=4.0), features), head(params, features) * 4, rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"a scale only. Got: mean=0.5"):
        head.fold(params, mean=0.5, std=1.0)


@pytest.mark.parametrize("output", ["sigmoid", "categorical"])
def test_only_identity_outputs_are_folded(output):
    head = Head(output=output)
    with pytest.raises(ValueError, match=f"Got: '{output}'"):
        head.fold(drawn(head), mean=0.0, std=1.0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (0.0, np.nan), (np.inf, 1.0)])
def test_a_normalisation_that_cannot_be_undone_is_refused(mean, std):
    with pytest.raises(ValueError, match="Got: mean="):
        Head().fold(drawn(Head()), mean, std)


@pytest.mark.parametrize("head", SHAPES, ids=str)
def test_stacked_heads_are_selected_again(head):
    alone = [drawn(head, seed, copies=1) for seed in range(COPIES)]
    stacked, features = stack(alone), normal(9, *BATCH, WIDTH)
    together, head = jax.jit(head)(stacked, features), jax.jit(head)
    for t, params in enumerate(alone):
        np.testing.assert_allclose(together[..., [t]], head(params, features), rtol=1e-5, atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, select(stacked, t), params)


def test_heads_of_different_shapes_are_not_stacked():
    odd = [Head((5,)), Head((4,)), Head((5,), bias=False), Head((5,), output="categorical")]
    for other in odd[1:]:
        with pytest.raises(ValueError, match="Heads of one shape"):
            stack([drawn(odd[0]), drawn(other)])
    with pytest.raises(ValueError, match=r"at least one. Got: \[\]"):
        stack([])


@pytest.mark.parametrize("t", [-1, COPIES])
def test_a_head_that_is_not_there_is_not_selected(t):
    with pytest.raises(IndexError, match=rf"0..2. Got: {t}"):
        select(drawn(Head()), t)


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"output": "softmax"}, "'softmax'"),
        ({"hidden": (4, 0)}, r"\(4, 0\)"),
        ({"num_atoms": 1}, "1"),
        ({"support": (1.0, 1.0)}, r"\(1.0, 1.0\)"),
        ({"support": (0.0, float("inf"))}, r"\(0.0, inf\)"),
    ],
)
def test_impossible_heads_are_refused(fields, got):
    with pytest.raises(ValueError, match=f"Got: {got}"):
        Head(**fields)


@pytest.mark.parametrize("eta", [0.5, 10.0])
def test_with_eta_a_head_gives_the_log_of_the_tilted_expectation(eta):
    """log E exp(eta r), for one bit and for atoms (Q#, arXiv 2502.20548)."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(5, 2))
    chance = 1 / (1 + np.exp(-logits))
    found = Head(output="sigmoid", eta=eta).values(jnp.asarray(logits))
    np.testing.assert_allclose(found, np.log(1 - chance + chance * np.exp(eta)), rtol=1e-5)
    logits = rng.normal(scale=3, size=(5, 2, 7))
    head = Head(output="categorical", num_atoms=7, support=(-1.0, 2.0), eta=eta)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.log((chances * np.exp(eta * np.linspace(-1, 2, 7))).sum(-1))
    np.testing.assert_allclose(head.values(jnp.asarray(logits)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"eta": 1.0}, {"eta": 0.0, "output": "sigmoid"}, {"eta": -1, "output": "categorical"}],
)
def test_eta_needs_a_distribution_of_the_reward(fields):
    with pytest.raises(ValueError, match="eta must be positive"):
        Head(**fields)
