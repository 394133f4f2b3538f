"""Checkpoints that were published as pickles, as folders that the library reads."""

import json

import numpy as np
import pytest

from experiments.convert import convert
from iro_jax.models import CheckpointError, from_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture
def scalar_model(tmp_path):
    """A reward model as the TL;DR checkpoints have it: its folder, its tokens and rewards."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**SIZES)
    backbone = transformers.GPTNeoXModel(config).eval()
    head = torch.nn.Linear(32, 1)
    tensors = {f"lm_backbone.{name}": t for name, t in backbone.state_dict().items()}
    tensors |= {f"scalar_head.{name}": t for name, t in head.state_dict().items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    fields = {
        "architectures": ["ScalarModel"],
        "base_config": config.to_dict(),
        "base_model": "models/EleutherAI/pythia/sft_model",
        "hidden_size": 32,
        "bias": 0.75,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tokens = np.arange(10, dtype=np.int32)[None] * 5
    with torch.no_grad():
        states = backbone(torch.tensor(tokens, dtype=torch.long)).last_hidden_state
        rewards = head(states)[..., 0] - 0.75
    return tmp_path, tokens, rewards.numpy()


def test_a_scalar_head_gives_the_same_rewards(scalar_model):
    folder, tokens, rewards = scalar_model
    convert(str(folder), folder / "converted")
    model = from_pretrained(folder / "converted")
    assert model.network.config.head == "score"
    mask = np.ones(tokens.shape, bool)
    outputs = model.network.forward(model.params, tokens, mask, want=("score",))
    np.testing.assert_allclose(outputs.score, rewards, atol=1e-5)


def test_a_language_model_is_copied_tensor_by_tensor(tmp_path):
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))
    # As checkpoints on the hub name it.
    named = {k.replace("lm_head.", "embed_out."): t for k, t in model.state_dict().items()}
    torch.save(named, tmp_path / "pytorch_model.bin")
    fields = model.config.to_dict() | {"architectures": ["GPTNeoXForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    convert(str(tmp_path), tmp_path / "converted")
    params = from_pretrained(tmp_path / "converted").params
    expected = model.gpt_neox.embed_in.weight.detach().numpy()
    np.testing.assert_array_equal(params["embedding"].get_value(), expected)


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"a": Harm()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        convert(str(tmp_path), tmp_path / "converted")
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "converted").exists()


def test_a_folder_without_a_pickle_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected config\.json and pytorch_model\.bin"):
        convert(str(tmp_path), tmp_path / "converted")
