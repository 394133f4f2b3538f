"""Random small checkpoints of every family, made by `transformers` in PyTorch.

These are the oracles of the models' tests: independent implementations, run in f32 with
eager attention. Weights are drawn large enough that logits differ by units, not by
millionths.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is the reference for these tests")
transformers = pytest.importorskip("transformers")

VOCABULARY = 101


@dataclasses.dataclass(frozen=True)
class Variant:
    """One configuration to check: a family, and what is special about it."""

    name: str
    model_type: str
    options: dict[str, Any]

    def hf_config(self, **changes: Any):
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.25,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.model_type != "gpt_neox":
            sizes |= {"num_key_value_heads": 2}
        return transformers.AutoConfig.for_model(
            self.model_type, **(sizes | self.options | changes)
        )

    def causal(self, **changes: Any):
        torch.manual_seed(0)
        config = self.hf_config(**changes)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        return _randomise(model)

    def classifier(self, **changes: Any):
        torch.manual_seed(0)
        config = self.hf_config(num_labels=1, **changes)
        model = transformers.AutoModelForSequenceClassification.from_config(
            config, attn_implementation="eager"
        )
        return _randomise(model)


def _randomise(model):
    """Also draws what Hugging Face initialises to constants, so that it is tested."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().float()


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6}

VARIANTS = [
    Variant("llama", "llama", {}),
    Variant("llama-llama3-rope", "llama", {"rope_parameters": _LLAMA3}),
    Variant(
        "llama-linear-rope-biases-tied",
        "llama",
        {
            "rope_parameters": _LINEAR,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Variant("mistral-window", "mistral", {"sliding_window": 6, "head_dim": 16}),
    Variant("mistral-full", "mistral", {"sliding_window": None, "head_dim": 8}),
    Variant("qwen2", "qwen2", {}),
    Variant(
        "qwen2-window-yarn",
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "rope_parameters": _YARN,
        },
    ),
    Variant("qwen3", "qwen3", {"head_dim": 16}),
    Variant("gemma2", "gemma2", {**_GEMMA, "attn_logit_softcapping": 5.0}),
    Variant(
        "gemma3",
        "gemma3_text",
        {
            **_GEMMA,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
            },
        },
    ),
    Variant("gpt-neox", "gpt_neox", {"rotary_pct": 0.5, "num_attention_heads": 2}),
    Variant(
        "gpt-neox-sequential",
        "gpt_neox",
        {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"},
    ),
]

FAMILIES = [v for v in VARIANTS if v.name in {x.model_type.removesuffix("_text") for x in VARIANTS}]
FAMILIES += [v for v in VARIANTS if v.name in ("mistral-window", "gpt-neox")]


def all_variants(test):
    return pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)(test)


def all_families(test):
    """One variant per family."""
    return pytest.mark.parametrize("variant", FAMILIES, ids=lambda v: v.name)(test)


def reference_logits(model, sequences: list[list[int]]) -> list[np.ndarray]:
    """Logits at every token of each sequence, each read alone and unpadded."""
    with torch.no_grad():
        return [model(torch.tensor([s])).logits[0].numpy() for s in sequences]
