"""Every configuration and its variants: they load, and say how they are run."""

import importlib
from pathlib import Path

import pytest

from configs import math, sweeps, tldr, tuning, ultrafeedback
from configs.base import get_base
from experiments.settings import loop_settings, search_settings, value_settings
from experiments.sweep import Point, changed_config
from iro_jax.models import Sampling
from iro_jax.values import FitSettings

NAMES = sorted(
    path.stem
    for path in (Path(__file__).parents[1] / "configs").glob("*.py")
    if path.stem not in ("__init__", "base", "sweeps", "tuning")
)
PAPER = ("math", "tldr", "ultrafeedback")
OURS = [name for name in NAMES if name not in PAPER]


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_and_its_variants_can_be_run(name):
    module = importlib.import_module(f"configs.{name}")
    assert f"python -m experiments.run --config=configs/{name}.py" in module.__doc__
    assert {"fast", "smollm2"} & set(module.VARIANTS)
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


@pytest.mark.parametrize("name", OURS)
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


@pytest.mark.parametrize("variant", ["1b", "6.9b"])
def test_tldr_is_the_papers(variant):
    config = tldr.get_config(variant)
    policy, revision = config.policy.name.split("@")
    assert policy == f"vwxyzjn/EleutherAI_pythia-{variant}-deduped__sft__tldr"
    assert revision == "sft__44413__1708611267"
    reward, judge = config.task.reward.target, config.task.judge.target
    assert reward.startswith("vwxyzjn/EleutherAI_pythia-1b-deduped__reward__tldr@")
    assert judge.startswith("vwxyzjn/EleutherAI_pythia-6.9b-deduped__reward__tldr@")
    # The first value function is the reward model.
    assert (config.value.backbone, config.value.head, config.value.trainable) == (
        reward,
        None,
        "all",
    )
    assert "__dpo__tldr@" in config.eval.tuned
    assert config.eval.untuned == tldr.get_config("1b").policy.name
    assert config.eval.endpoint.template == "tldr"
    assert config.task.train.source == config.task.evaluation.source == tldr.DATASET
    assert tldr.DATASET.endswith(
        "summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    )
    assert (config.task.evaluation.split, config.task.evaluation.limit) == ("test", 300)
    assert not config.task.train.chat
    _check_search(config, 53, 16, Sampling(0.7, 50, 1.0))
    _check_loop(config, betas=(1, 1, 1), batch_size=256)


@pytest.mark.parametrize("variant", ["8b", "70b"])
def test_ultrafeedback_is_the_papers(variant):
    config = ultrafeedback.get_config(variant)
    assert config.policy.name == f"meta-llama/Meta-Llama-3-{variant.upper()}-Instruct"
    assert config.value.backbone == "HuggingFaceH4/mistral-7b-sft-beta"
    reward = config.task.reward
    assert (reward.kind, reward.trainable) == ("pairs", "all")
    assert reward.pairs.source == "hf:HuggingFaceH4/ultrafeedback_binarized"
    assert (reward.fit.learning_rate, reward.fit.num_epochs) == (5e-6, 3)
    assert config.eval.tuned == "HuggingFaceH4/zephyr-7b-beta"
    assert config.eval.untuned == "HuggingFaceH4/mistral-7b-sft-beta"
    assert config.task.train.chat
    assert config.task.evaluation.chat
    assert config.mesh.model == (4 if variant == "70b" else 8)
    _check_search(config, 2048, 16, Sampling(0.6, 50, 0.9))
    _check_loop(config, betas=(1, 2, 2.5), batch_size=512)


def test_math_is_the_papers():
    config = math.get_config()
    assert (config.policy.name, config.value.backbone) == ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-1.5B")
    assert config.task.reward.kind == "boxed"
    assert "\\boxed{}" in config.task.train.system
    for section in (config.task.train, *config.task.evaluation.values()):
        assert (section.chat, section.system) == (True, math.SYSTEM)
    assert config.task.evaluation.gsm8k.limit == 500
    assert config.task.evaluation.math500.limit is None
    assert value_settings(config).loss == "verifiable"
    assert config.loop.mixed_only
    _check_search(config, 512, 8, Sampling(0.7, None, 1.0))
    assert search_settings(config).num_candidates == 16
    _check_loop(config, betas=(1, 1), batch_size=256, prompts=7473)


def _check_search(config, max_new_tokens, chunk_length, sampling):
    search = search_settings(config)
    assert (search.beam_width, search.num_successors) == (4, 4)
    assert (search.max_new_tokens, search.chunk_length) == (max_new_tokens, chunk_length)
    assert search.sampling == sampling


def _check_loop(config, *, betas, batch_size, prompts=8192):
    loop, value = loop_settings(config), value_settings(config)
    assert loop.betas == betas
    assert loop.prompts_per_iteration == prompts
    assert value.trainable == "all"
    fit = value.fit
    assert (fit.learning_rate, fit.epsilon, fit.num_epochs) == (3e-6, 1e-5, 10)
    assert fit.batch_size == batch_size


@pytest.mark.parametrize("name", PAPER)
def test_a_flag_reaches_every_part_that_reads_the_same_file(name):
    config = importlib.import_module(f"configs.{name}").get_config("smollm2")
    config.lock()
    config.task.path = "all.jsonl"
    assert config.task.train.path == "all.jsonl"
    config.task.train.path = "other.jsonl"
    assert config.task.path == "all.jsonl"
    with pytest.raises(AttributeError, match="pathh"):
        config.task.pathh = "typo"
