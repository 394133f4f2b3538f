"""Every configuration and its variants: they load, and say how they are run."""

import importlib
from pathlib import Path

import pytest

from configs import sweeps, tuning
from configs.base import get_base
from experiments.settings import loop_settings, search_settings, value_settings
from experiments.sweep import Point, changed_config
from iro_jax.values import FitSettings

NAMES = sorted(
    path.stem
    for path in (Path(__file__).parents[1] / "configs").glob("*.py")
    if path.stem not in ("__init__", "base", "sweeps", "tuning")
)


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_and_its_variants_can_be_run(name):
    module = importlib.import_module(f"configs.{name}")
    assert f"python -m experiments.run --config=configs/{name}.py" in module.__doc__
    assert "fast" in module.VARIANTS
    for variant in module.VARIANTS:
        config = module.get_config(variant)
        assert config.name == name
        assert set(config) == set(get_base())
        assert set(config.search) == set(get_base().search)
        search_settings(config)
        loop_settings(config)
        value_settings(config)
    with pytest.raises(ValueError, match="Got: 'slow'"):
        module.get_config("slow")


@pytest.mark.parametrize("name", NAMES)
def test_fast_variants_leave_the_test_prompts_alone(name):
    assert importlib.import_module(f"configs.{name}").get_config("fast").eval.split == "validation"


@pytest.mark.parametrize("variant", tuning.VARIANTS)
def test_tuning_has_the_fields_of_a_run_and_its_own(variant):
    config = tuning.get_config(variant)
    assert set(config) == {*get_base(), "tuning"}
    assert config.eval.split == "validation"
    search_settings(config)
    for name in tuning.METHODS:
        FitSettings(**config.tuning[name].fit)


@pytest.mark.parametrize("variant", sweeps.VARIANTS)
def test_every_point_of_a_sweep_changes_fields_that_exist(variant):
    config = sweeps.get_config(variant)
    points = [Point(label, dict(changes)) for label, changes in config.points]
    assert len({point.folder for point in points}) == len(points) >= 3
    seen = []
    for point in points:
        changed = changed_config(config.run, point)
        search_settings(changed)
        loop_settings(changed)
        value_settings(changed)
        seen.append(changed.to_json_best_effort())
    assert len(set(seen)) == len(points)
    with pytest.raises(ValueError, match=r"no field 'search\.chunk'"):
        changed_config(config.run, Point("x", {"search.chunk": 1}))
