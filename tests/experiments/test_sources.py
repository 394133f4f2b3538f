"""Models and datasets by hub name or local path: what is missing is told before anything else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import math, tldr, ultrafeedback
from configs.base import get_base
from experiments.run import run_seed
from experiments.sources import (
    Source,
    SourceError,
    check_sources,
    policy_source,
    reward_source,
    value_source,
)
from iro_jax.models import HubError
from iro_jax.models.weights import locate
from tests.experiments import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """A machine without access, on which nothing was downloaded before."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no access. And some advice.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr("datasets.load_dataset", offline)


@pytest.mark.needs("datasets")
@pytest.mark.parametrize(
    ("module", "name", "flags"),
    [
        (tldr, "EleutherAI_pythia-1b-deduped__sft__tldr", ("task.reward.path", "task.judge.path")),
        (ultrafeedback, "Meta-Llama-3-8B-Instruct", ("value.backbone_path", "task.reward.pairs")),
        (math, "Qwen2.5-3B", ("value.backbone_path", "task.evaluation.math500.path")),
    ],
)
def test_without_the_hub_one_line_names_files_and_flags(no_hub, tmp_path, module, name, flags):
    with pytest.raises(SourceError) as caught:
        run_seed(module.get_config(), tmp_path / "run", progress=False)
    told = str(caught.value)
    assert "\n" not in told
    assert name in told
    assert "config.json, model.safetensors (or model.safetensors.index.json" in told
    assert "tokenizer.json" in told
    for flag in ("policy.path=FOLDER", "task.train.path=FILE", *flags):
        assert f"--config.{flag}" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_tells_it_too(tmp_path):
    """The real client of the hub, told not to look for it, with an empty cache."""
    command = [sys.executable, "-m", "experiments.run", "--config=configs/math.py"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "SourceError" in line]
    assert "'Qwen/Qwen2.5-3B' is no local folder" in line
    assert "--config.policy.path=FOLDER" in line
    assert "hf:HuggingFaceH4/MATH-500" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_part_of_a_repository_is_not_taken_for_all_of_it(tmp_path, monkeypatch):
    """Without access the client returns the folder of whatever was cached."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(HubError) as caught:
        locate("a/b@c")
    assert [file.split()[0] for file in caught.value.files] == ["config.json", "model.safetensors"]
    assert "revision 'c'" in str(caught.value)
    (tmp_path / "config.json").write_text("{}")
    shards = {"x": "model-1-of-2.safetensors", "y": "model-2-of-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "model-1-of-2.safetensors").write_text("")
    with pytest.raises(HubError) as caught:
        locate("a/b")
    assert caught.value.files == ("model-2-of-2.safetensors",)
    (tmp_path / "model-2-of-2.safetensors").write_text("")
    assert locate("a/b") == tmp_path


def test_a_path_is_read_instead_of_the_name(tmp_path):
    config = tldr.get_config()
    config.policy.path = str(tmp_path)
    assert policy_source(config).place == str(tmp_path)
    assert reward_source(config.task.reward, "reward").place.startswith("vwxyzjn/")
    config.task.reward.path = str(tmp_path)
    # Value functions start from the reward model, wherever that is.
    assert value_source(config) == reward_source(config.task.reward, "reward")
    config.value.backbone_path = str(tmp_path / "other")
    with pytest.raises(SourceError, match=r"value\.backbone_path=FOLDER: there is nothing at"):
        assert value_source(config).place
    assert value_source(get_base()) is None


def test_paths_and_names_that_are_missing_are_told_together(tmp_path):
    tiny.write_all(tmp_path)
    config = tiny.get_config(str(tmp_path))
    check_sources(config)
    config.task.train.path = str(tmp_path / "none.jsonl")
    config.task.evaluation.source = ""
    with pytest.raises(SourceError) as caught:
        check_sources(config)
    first, second = str(caught.value).split(" | ")
    assert first == f"--config.task.train.path=FILE: there is nothing at '{tmp_path}/none.jsonl'"
    assert second == "--config.task.evaluation.path=FILE has to say what is read. Got: nothing"


def test_a_source_needs_a_name_or_a_path():
    assert Source("hub/name", None, "--flag").place == "hub/name"
    with pytest.raises(SourceError, match="--flag has to say what is read"):
        assert Source("", None, "--flag").place
