"""GGUF files, written here type by type, and the ones that come from packages."""

import hashlib
import importlib

import gguf
import jax
import numpy as np
import pytest

from iro_jax.models import CheckpointError, from_pretrained, save_pretrained
from iro_jax.models.weights import gguf_file, locate, open_checkpoint
from tests.models.references import VARIANTS, reference_logits

pytestmark = pytest.mark.slow

WRITABLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
# Relative root-mean-square error of a type's rounding of normal weights, with some room.
ROUNDING = {"F32": 0, "F16": 1e-3, "BF16": 5e-3, "Q8_0": 0.02}
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}


def variant(name):
    return next(v for v in VARIANTS if v.name == name)


def llama_rows(weight, heads):
    """llama.cpp's order of query and key rows: the two halves of each head interleaved."""
    head = weight.shape[0] // heads
    return np.concatenate(
        [
            weight[h * head + i + j][None]
            for h in range(heads)
            for i in range(head // 2)
            for j in (0, head // 2)
        ]
    )


def write_gguf(path, model, architecture, kind="F32", tokenizer=True):
    """Writes a reference model as its converter would."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    if architecture == "gptneox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(head_dim)
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        alphabet = [chr(c) for c in (*range(33, 127),)] + ["\u0120", "he", "<|end|>"]
        writer.add_token_list(alphabet[: config.vocab_size])
        writer.add_token_types([1] * 96 + [3])
        writer.add_token_merges(["h e"])
        writer.add_eos_token_id(96)
        writer.add_chat_template("{{ messages[0]['content'] }}")
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, suffix = name.rsplit(".", 1)
        data = tensor.numpy()
        heads = config.num_attention_heads
        if architecture == "llama" and "q_proj" in name:
            data = llama_rows(data, heads)
        if architecture == "llama" and "k_proj" in name:
            data = llama_rows(data, config.num_key_value_heads)
        if "query_key_value" in name:
            by_head = data.reshape(heads, 3, head_dim, *data.shape[1:])
            data = np.concatenate([by_head[:, i].reshape(-1, *data.shape[1:]) for i in range(3)])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            data = data + 1
        quantised = gguf.GGMLQuantizationType[kind if data.ndim == 2 else "F32"]
        writer.add_tensor(
            f"{names.get_name(stem)}.{suffix}",
            gguf.quantize(np.ascontiguousarray(data), quantised),
            raw_dtype=quantised,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma2", "gemma2"),
        ("gemma3", "gemma3"),
        ("gpt-neox", "gptneox"),
    ],
)
def test_every_family_reads_the_same_from_gguf(name, architecture, tmp_path):
    changes = {"num_hidden_layers": 2, "vocab_size": 97}
    if name.startswith("gemma"):
        # What llama.cpp's converter assumes: the scale by head, and the pattern of layers.
        changes |= {"query_pre_attn_scalar": 16, "layer_types": None}
    if name == "gemma3":
        theta = {"rope_type": "default", "rope_theta": 1e6}
        changes |= {
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": theta,
                "sliding_attention": theta | {"rope_theta": 1e4},
            },
        }
    reference = variant(name).causal(**changes)
    model = from_pretrained(write_gguf(tmp_path / "m.gguf", reference, architecture))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 97, (2, 20)).astype(np.int32)
    outputs = jax.jit(model.network.forward)(model.params, tokens, np.ones(tokens.shape, bool))
    want = np.stack(reference_logits(reference, tokens.tolist()))
    np.testing.assert_allclose(outputs.logits, want, atol=1e-4, rtol=0)
    assert model.eos_ids == (96,)
    assert model.tokenizer.encode("he he") == [95, 94, 95]
    assert model.tokenizer.chat_template

    save_pretrained(model, tmp_path / "export")
    again = from_pretrained(tmp_path / "export")
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    assert again.network == model.network
    assert again.tokenizer.encode("he he") == [95, 94, 95]
    assert again.eos_ids == (96,)


@pytest.mark.parametrize("kind", WRITABLE)
def test_stored_types(kind, tmp_path):
    reference = variant("llama").causal(**SIZES, num_hidden_layers=1, vocab_size=97)
    path = write_gguf(tmp_path / "m.gguf", reference, "llama", kind)
    checkpoint = open_checkpoint(path)
    for name, tensor in reference.state_dict().items():
        whole = tuple(slice(0, size) for size in tensor.shape)
        got, want = checkpoint.read(name, whole), tensor.numpy()
        error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
        assert error <= (ROUNDING.get(kind, 0.15) if want.ndim == 2 else 0), (name, error)
        # A part of a tensor is that part, rows reordered or not.
        part = tuple(slice(size // 4, size // 2) for size in tensor.shape)
        np.testing.assert_array_equal(checkpoint.read(name, part), got[part])


def test_k_quants_follow_their_definition(tmp_path):
    """Q4_K and Q6_K blocks of random bytes, decoded number by number as ggml defines them."""
    rng = np.random.default_rng(0)

    def half(x):
        return np.frombuffer(np.float16(x).tobytes(), np.uint8)

    def q4_k(block):
        d, dmin = np.frombuffer(block[:4].tobytes(), np.float16).astype(float)
        packed, nibbles = block[4:16].astype(int), block[16:].astype(int)
        out = []
        for sub in range(8):
            if sub < 4:
                scale, low = packed[sub] & 63, packed[sub + 4] & 63
            else:
                scale = (packed[sub + 4] & 15) | ((packed[sub - 4] >> 6) << 4)
                low = (packed[sub + 4] >> 4) | ((packed[sub] >> 6) << 4)
            for i in range(32):
                byte = nibbles[(sub // 2) * 32 + i]
                out.append(d * scale * (byte >> 4 if sub % 2 else byte & 15) - dmin * low)
        return out

    def q6_k(block):
        low, high = block[:128].astype(int), block[128:192].astype(int)
        scales = block[192:208].view(np.int8).astype(int)
        d = float(np.frombuffer(block[208:].tobytes(), np.float16)[0])
        out = []
        for i in range(256):
            half_index, within = divmod(i, 128)
            quarter, place = divmod(within, 32)
            byte = low[half_index * 64 + (quarter % 2) * 32 + place]
            nibble = byte >> 4 if quarter >= 2 else byte & 15
            bits = (high[half_index * 32 + place] >> (2 * quarter)) & 3
            out.append(d * scales[i // 16] * ((nibble | bits << 4) - 32))
        return out

    for kind, size, decode in (("Q4_K", 144, q4_k), ("Q6_K", 210, q6_k)):
        blocks = rng.integers(0, 256, (3, size)).astype(np.uint8)
        for row in blocks:
            if kind == "Q4_K":
                row[:4] = np.concatenate([half(rng.normal()), half(rng.normal())])
            else:
                row[208:] = half(rng.normal())
        got = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        want = np.array([decode(row) for row in blocks])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_file_that_was_written_again_is_read_again(tmp_path):
    reference = variant("llama").causal(**SIZES, num_hidden_layers=1, vocab_size=97)
    path = write_gguf(tmp_path / "m.gguf", reference, "llama")
    first = open_checkpoint(path)
    assert open_checkpoint(path) is first
    write_gguf(path, reference, "llama", "F16")
    assert open_checkpoint(path) is not first


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path):
        reference = variant("llama").causal(**SIZES, num_hidden_layers=1, vocab_size=97)
        return write_gguf(tmp_path / "m.gguf", reference, "llama")

    def test_truncated_file(self, path):
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=r"m\.gguf: truncated or not a GGUF"):
            from_pretrained(path)

    def test_truncated_header(self, path):
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(CheckpointError, match=r"m\.gguf: truncated or not a GGUF"):
            from_pretrained(path)

    def test_not_gguf(self, path):
        path.write_bytes(b"PK" * 500)
        with pytest.raises(CheckpointError, match=r"m\.gguf: truncated or not a GGUF"):
            from_pretrained(path)

    def test_unknown_architecture(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
        writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(CheckpointError, match=r"general\.architecture.*Got: 'mamba'"):
            from_pretrained(tmp_path / "m.gguf")

    @pytest.mark.parametrize("field", ["llama.block_count", "llama.attention.head_count"])
    def test_missing_metadata(self, path, field, monkeypatch):
        reader = gguf.GGUFReader(path)
        reader.fields.pop(field)
        monkeypatch.setattr(gguf_file, "Reader", lambda _: reader)
        with pytest.raises(CheckpointError, match=r"m\.gguf: the file does not say"):
            from_pretrained(path)

    def test_unsupported_type(self, path, monkeypatch):
        monkeypatch.setattr(gguf_file, "_TYPES", ("Q8_0",))
        with pytest.raises(CheckpointError, match=r"must be stored as one of Q8_0. Got: F32"):
            from_pretrained(path)


class TestPackages:
    """A GGUF file in parts, spread over packages, is joined once and verified always."""

    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        content = b"GGUF" + bytes(range(256)) * 100
        checksum = hashlib.sha256(content).hexdigest()
        site = tmp_path / "site"
        parts = {"toy": {"SHA256SUMS": f"{checksum}  toy.gguf\n".encode()}}
        for index in range(2):
            cut = content[index * 10000 : (index + 1) * 10000 if index == 0 else None]
            parts[f"toy-part{index}"] = {f"toy.gguf.part0{index}": cut}
        for name, files in parts.items():
            module = name.replace("-", "_")
            (site / module).mkdir(parents=True)
            info = site / f"{module}-1.0.dist-info"
            info.mkdir()
            requires = "".join(f"Requires-Dist: toy-part{i}==1.0\n" for i in range(2))
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            (info / "METADATA").write_text(metadata + (requires if name == "toy" else ""))
            for file, data in files.items():
                (site / module / file).write_bytes(data)
            (info / "RECORD").write_text("".join(f"{module}/{file},,\n" for file in files))
        monkeypatch.syspath_prepend(site)
        monkeypatch.setenv("IRO_JAX_CACHE", str(tmp_path / "cache"))
        importlib.invalidate_caches()
        return site, content

    def test_parts_are_joined(self, package):
        _, content = package
        path = locate("pip:toy")
        assert path.read_bytes() == content
        assert path.parent.name == "toy"

    def test_a_damaged_join_is_made_again(self, package):
        _, content = package
        locate("pip:toy").write_bytes(b"cut short")
        assert locate("pip:toy").read_bytes() == content

    def test_damaged_parts_are_refused_and_leave_nothing(self, package, tmp_path):
        site, _ = package
        (site / "toy_part1" / "toy.gguf.part01").write_bytes(b"wrong")
        with pytest.raises(CheckpointError, match=r"wrong checksum.*Expected SHA-256"):
            locate("pip:toy")
        assert list((tmp_path / "cache" / "toy").iterdir()) == []

    def test_a_missing_part_is_named(self, package):
        site, _ = package
        (site / "toy_part1-1.0.dist-info" / "METADATA").unlink()
        (site / "toy_part1-1.0.dist-info").rename(site / "gone")
        with pytest.raises(CheckpointError, match=r"part toy-part1 is not installed"):
            locate("pip:toy")
