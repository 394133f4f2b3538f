"""Shapes of the paper's models, without their weights."""

import json

import jax
import pytest

from experiments.plan.architectures import architecture
from iro_jax.models import CheckpointError, Network

# Numbers of parameters as their checkpoints have them.
COUNTS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
    "HuggingFaceH4/mistral-7b-sft-beta": 7_241_732_096,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "EleutherAI/pythia-1b-deduped": 1_011_781_632,
    "vwxyzjn/EleutherAI_pythia-6.9b-deduped__sft__tldr": 6_857_302_016,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


def count(config):
    return sum(x.size for x in jax.tree.leaves(Network(config).abstract_params()))


@pytest.mark.parametrize("name", COUNTS)
def test_built_in_shapes_have_the_parameters_of_the_checkpoints(name):
    assert count(architecture(name)) == COUNTS[name]


def test_a_score_head_takes_the_place_of_the_unembedding():
    name = "HuggingFaceH4/mistral-7b-sft-beta"
    with_score = architecture(name, head="score")
    assert count(with_score) == COUNTS[name] - 32_000 * 4096 + 4096
    assert with_score.dtype == "bfloat16"


def test_a_local_file_stands_for_any_name(tmp_path):
    fields = {
        "model_type": "llama",
        "vocab_size": 99,
        "hidden_size": 8,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = architecture(str(tmp_path))
    assert (found.vocab_size, found.num_layers, found.dtype) == (99, 3, "float32")
    assert architecture(str(tmp_path / "config.json"), dtype="bfloat16").dtype == "bfloat16"


def test_an_unknown_name_is_an_error():
    with pytest.raises(CheckpointError):
        architecture("no such model")
