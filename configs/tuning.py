"""What methods that may touch weights reach on the task of `configs/smollm2.py`.

A reward model (all weights) and DPO (LoRA) from pairs of the policy's own answers; GRPO and iREPO
(LoRA) from the answers that they sample on the way. On two cores the first two take three to five
minutes, GRPO and iREPO longer. What each gained, and that iREPO is not shown to help with these
settings: experiments/RESULTS.md.

    python -m experiments.tuning --config=configs/tuning.py --workdir=runs/tuning
"""

from typing import Any

from ml_collections import ConfigDict

from configs import smollm2
from configs.base import fit_fields

VARIANTS = ("", "fast")
METHODS = ("reward_model", "dpo", "grpo", "irepo")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"The variants of this config are {VARIANTS}. Got: {variant!r}")
    config = smollm2.get_config("fast" if variant == "fast" else "")
    config.name = "tuning"
    config.eval.split = "validation"
    config.tuning = tuning_fields()
    if variant == "fast":
        config.tuning.num_prompts = 16
        for name in ("grpo", "irepo"):
            config.tuning[name].rounds = 2
    return config


def tuning_fields() -> ConfigDict:
    """The fields of `config.tuning`."""
    return ConfigDict(
        {
            "methods": METHODS,
            # Training prompts whose answers make pairs, and the share of them that is held out.
            "num_prompts": 64,
            "pairs_per_prompt": 4,
            "held_out": 0.125,
            # Samples of every policy for an evaluation prompt.
            "answers": 4,
            "reward_model": {"fit": _fit(6e-4, batch_size=8, num_epochs=1)},
            "dpo": {"beta": 0.1, **_adapters(1e-3, batch_size=8)},
            "grpo": {
                "clip": 0.2,
                "beta": 0.04,
                "answers": 8,
                **_rounds(),
                **_adapters(1e-3, batch_size=32),
            },
            "irepo": {
                "beta": 0.1,
                "answers": 8,
                # Rewards that vote beside the task's own; kinds of `experiments/tasks/rewards.py`.
                "annotators": ("vader",),
                "label_clip": 0.05,
                **_rounds(),
                **_adapters(1e-3, batch_size=16),
            },
        }
    )


def _rounds() -> dict[str, Any]:
    return {"rounds": 8, "prompts_per_round": 17}


def _adapters(learning_rate: float, *, batch_size: int) -> dict[str, Any]:
    return {
        "trainable": "adapters",
        "rank": 8,
        "remat": False,
        "fit": _fit(learning_rate, batch_size=batch_size, num_epochs=1),
    }


def _fit(learning_rate: float, *, batch_size: int, num_epochs: int) -> ConfigDict:
    fields = ConfigDict(fit_fields())
    fields.update(learning_rate=learning_rate, batch_size=batch_size, num_epochs=num_epochs)
    return fields
