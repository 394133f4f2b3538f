"""Every configuration and its variants: they load, and say how they are run."""

import importlib
from pathlib import Path

import pytest

from configs.base import get_base
from experiments.run import _loop_settings, _search_settings, _value_settings

NAMES = sorted(
    path.stem
    for path in (Path(__file__).parents[1] / "configs").glob("*.py")
    if path.stem not in ("__init__", "base")
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
        _search_settings(config)
        _loop_settings(config)
        _value_settings(config)
    with pytest.raises(ValueError, match="Got: 'slow'"):
        module.get_config("slow")


@pytest.mark.parametrize("name", NAMES)
def test_fast_variants_leave_the_test_prompts_alone(name):
    assert importlib.import_module(f"configs.{name}").get_config("fast").eval.split == "validation"
