"""What a config may say about beta, and Theorem 1's choice of it."""

import math

import ml_collections
import numpy as np
import pytest

from iro_jax.schedules import betas, theorem, theorem_omega


@pytest.mark.parametrize("spec", [2, 2.0, np.float32(2)])
def test_a_number_is_the_same_for_all_iterations(spec):
    assert betas(spec, 3) == (2.0, 2.0, 2.0)
    assert all(type(beta) is float for beta in betas(spec, 3))


@pytest.mark.parametrize("spec", [(1, 2, 2.5), [1, 2, 2.5]])
def test_a_list_has_one_number_for_each_iteration(spec):
    assert betas(spec, 3) == (1.0, 2.0, 2.5)


@pytest.mark.parametrize("num_iterations", [2, 4])
def test_a_list_of_another_length_is_refused(num_iterations):
    with pytest.raises(ValueError, match=rf"each of the {num_iterations} .* Got: 3 numbers"):
        betas((1, 2, 2.5), num_iterations)


def test_theorem_1s_betas_grow_with_the_square_root():
    assert betas({"name": "theorem", "omega": 0.5}, 4) == pytest.approx(
        (2.0, 2.0 * 2**0.5, 2.0 * 3**0.5, 4.0)
    )
    assert theorem(8, 1.5) == 2.0


def test_omega_by_hand():
    """C_ST = e^2, r_max = 4, T = 1000: omega^2 = 4 / (16 log 1000)."""
    assert theorem_omega(2.0, 4.0, 1000) == pytest.approx(0.19023987, rel=1e-6)
    spec = {"name": "theorem", "log_concentrability": 2.0, "r_max": 4.0}
    assert betas(spec, 1000)[999] == pytest.approx(math.sqrt(1000) / 0.19023987, rel=1e-6)


def test_omega_of_an_answer_too_unlikely_for_a_float():
    """C_ST = exp(3000) overflows; its logarithm does not."""
    assert theorem_omega(3000.0, 1.0, 10) == pytest.approx(math.sqrt(6000 / math.log(10)))


def test_beta_has_the_unit_of_the_reward():
    """Rewards ten times as large ask for betas ten times as large: the same policies."""
    one, ten = (
        betas({"name": "theorem", "log_concentrability": 3.0, "r_max": r_max}, 5)
        for r_max in (1.0, 10.0)
    )
    np.testing.assert_allclose(np.array(ten), 10 * np.array(one), rtol=1e-12)


def test_a_config_may_hold_any_of_them():
    config = ml_collections.ConfigDict(
        {"number": 2, "list": (1, 2), "theorem": {"name": "theorem", "omega": 2.0}}
    )
    assert betas(config.number, 2) == (2.0, 2.0)
    assert betas(config.list, 2) == (1.0, 2.0)
    assert betas(config.theorem, 2) == (0.5, 2**0.5 / 2)
    assert "name" in config.theorem


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf, True])
@pytest.mark.parametrize("place", ["number", "list", "omega", "r_max", "log_concentrability"])
def test_numbers_must_be_positive_and_finite(wrong, place):
    spec = {
        "number": wrong,
        "list": (1, wrong),
        "omega": {"name": "theorem", "omega": wrong},
        "r_max": {"name": "theorem", "log_concentrability": 1.0, "r_max": wrong},
        "log_concentrability": {"name": "theorem", "log_concentrability": wrong, "r_max": 1.0},
    }[place]
    name = {"number": "beta", "list": r"betas\[1\]"}.get(place, place)
    with pytest.raises(ValueError, match=f"^{name} must be a positive finite number. Got: {wrong}"):
        betas(spec, 2)


@pytest.mark.parametrize(
    "spec",
    [
        None,
        "theorem",
        {},
        {"name": "theorem"},
        {"name": "sqrt", "omega": 1.0},
        {"name": "theorem", "omega": 1.0, "r_max": 1.0},
        {"name": "theorem", "r_max": 1.0},
    ],
)
def test_other_forms_are_refused_with_those_that_exist(spec):
    with pytest.raises(ValueError, match=r"betas must be a number, one number for each .* Got: "):
        betas(spec, 2)


def test_an_empty_run_has_no_betas():
    with pytest.raises(ValueError, match=r"num_iterations must be at least 1\. Got: 0"):
        betas(1.0, 0)


def test_omega_needs_two_iterations():
    """log 1 is 0."""
    with pytest.raises(ValueError, match=r"at least 2 iterations\. Got: 1"):
        theorem_omega(1.0, 1.0, 1)
