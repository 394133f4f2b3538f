"""The families of checkpoints that `TransformerConfig` covers, one small file each."""

from collections.abc import Mapping
from typing import Any

from iro_jax.models.config import Head, TransformerConfig
from iro_jax.models.families.base import Family, WeightNames
from iro_jax.models.families.gemma import GEMMA2, GEMMA3
from iro_jax.models.families.gpt_neox import GPT_NEOX
from iro_jax.models.families.llama import LLAMA
from iro_jax.models.families.mistral import MISTRAL
from iro_jax.models.families.normal import normal_config
from iro_jax.models.families.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, GPT_NEOX)
}


def family_of(raw_config: Mapping[str, Any], origin: str = "config.json") -> Family:
    """The family that a `config.json` belongs to.

    Raises:
      ValueError: it is none of `FAMILIES`; the message names `origin` and the field.
    """
    model_type = raw_config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{origin}: model_type must be one of {sorted(FAMILIES)}."
            f" Got: {model_type!r} (architectures: {raw_config.get('architectures')})"
        )
    return FAMILIES[model_type]


def translate_config(
    raw_config: Mapping[str, Any],
    *,
    head: Head | None = None,
    dtype: str = "float32",
    origin: str = "config.json",
) -> TransformerConfig:
    """A Hugging Face configuration as a `TransformerConfig`.

    `transformers` fills in the defaults of fields that are absent, and knows the older
    spellings of others.

    Args:
      raw_config: the content of a `config.json`.
      head: what the network ends in; by default `score` if the configuration's
        `architectures` name a `...ForSequenceClassification`, else `logits`.
      dtype: of the computation.
      origin: where the configuration comes from, for messages.
    """
    family = family_of(raw_config, origin)
    fields = {key: value for key, value in raw_config.items() if key != "model_type"}
    try:
        config = family.translate(normal_config(family.model_type, fields))
    except KeyError as error:
        raise ValueError(f"{origin}: field {error} is missing") from error
    except Exception as error:  # transformers raises types of its own for malformed fields
        raise ValueError(f"{origin}: {error}") from error
    if head is None:
        architectures = raw_config.get("architectures") or ()
        if isinstance(architectures, str):
            architectures = (architectures,)
        classifies = any(name.endswith("ForSequenceClassification") for name in architectures)
        head = "score" if classifies else "logits"
    return config.replace(head=head, dtype=dtype)


__all__ = ["FAMILIES", "Family", "WeightNames", "family_of", "translate_config"]
