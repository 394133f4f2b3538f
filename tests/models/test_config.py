"""Configurations are checked when they are made."""

import pytest

from iro_jax.models import FAMILIES, translate_config
from iro_jax.models.families import normal
from iro_jax.testing import tiny_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1. Got: 0"),
        ({"num_kv_heads": 3}, "must divide num_heads. Got: num_heads=4, num_kv_heads=3"),
        ({"layers": ()}, "at least one layer"),
        ({"dtype": "float16"}, r"dtype must be one of \('float32', 'bfloat16'\). Got: 'float16'"),
        ({"head": "reward"}, r"head must be one of \('logits', 'score'\). Got: 'reward'"),
        ({"norm": "batch"}, "norm must be one of .*Got: 'batch'"),
        ({"activation": "tanh"}, "activation must be one of .*Got: 'tanh'"),
    ],
)
def test_impossible_networks(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_equal_configurations_are_equal_networks():
    from iro_jax.testing import tiny_network

    assert tiny_network() == tiny_network()
    assert hash(tiny_network()) == hash(tiny_network())
    assert tiny_network() != tiny_network(head="score")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_translates_its_defaults(model_type):
    sizes = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = translate_config({"model_type": model_type, **sizes})
    assert config.num_layers == 6
    assert config.head == "logits"
    scored = translate_config(
        {"model_type": model_type, "architectures": ["XForSequenceClassification"], **sizes}
    )
    assert scored == config.replace(head="score")


def test_older_spellings_of_rope():
    base = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    old = translate_config(
        base | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    )
    parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert old == translate_config(base | {"rope_parameters": parameters})
    assert old.layers[0].rope.scaling is not None


def test_errors_name_the_origin_and_the_field():
    with pytest.raises(ValueError, match=r"my\.json: model_type must be one of.*Got: None"):
        translate_config({}, origin="my.json")
    with pytest.raises(ValueError, match=r"my\.json: .*layer_types"):
        translate_config(
            {
                "model_type": "gemma2",
                "num_hidden_layers": 2,
                "layer_types": ["full_attention", "chunked_attention"],
            },
            origin="my.json",
        )


def test_what_transformers_says_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    ask = normal._by_transformers

    def ask_and_count(*question):
        asked.append(question)
        return ask(*question)

    monkeypatch.setattr(normal, "_by_transformers", ask_and_count)
    small, large = ({"hidden_size": size, "head_dim": None} for size in (64, 128))
    first = normal.normal_config("llama", small)
    assert normal.normal_config("llama", dict(reversed(small.items()))) == first
    assert len(asked) == 1
    assert normal.normal_config("llama", large)["hidden_size"] == 128
    assert normal.normal_config("mistral", small)["model_type"] == "mistral"
    assert len(asked) == 3
    for file in (tmp_path / "iro_jax" / "configs").iterdir():
        file.write_text(file.read_text()[:50])
    assert normal.normal_config("llama", small) == first  # half a file is not believed
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    assert normal.normal_config("llama", small) == first  # there is nowhere to keep it
    assert len(asked) == 5
