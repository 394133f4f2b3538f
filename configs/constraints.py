"""Instructions about the form of an answer that a program can check, with a binary reward.

SmolLM2-135M-Instruct writes short texts under constraints of IFEval's kinds; value functions
are fitted by binary cross-entropy (49) on its own hidden states.

What to expect, from 60 test prompts: the share of answers that meet all constraints rises from
0.14 (base) to 0.42, 0.40 and 0.48 in guided samples after one and two iterations and compressed.
Where the verifier may pick, best-of-16 (0.85) stays ahead of guided candidates (0.73):
experiments/RESULTS.md says why.

    python -m experiments.run --config=configs/constraints.py --workdir=runs/constraints
"""

from ml_collections import ConfigDict

from configs.base import get_base

VARIANTS = ("", "fast")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"The variants of this config are {VARIANTS}. Got: {variant!r}")
    config = get_base()
    config.name = "constraints"
    config.task = ConfigDict({"name": "constraints", "num_evaluation": 60})
    config.search.update(max_new_tokens=48, chunk_length=8, shard_size=24)
    config.search.sampling.update(temperature=1.0, top_k=50)
    config.loop.update(num_iterations=2, prompts_per_iteration=96, select="per_parent")
    config.value.loss = "verifiable"
    config.value.layer = 16
    config.value.head.update(hidden=(128,), output="sigmoid")
    for fit in (config.value.fit, config.value.compression):
        fit.update(learning_rate=1e-3, batch_size=64, num_epochs=20, weight_decay=1e-1)
    if variant == "fast":
        config.task.num_evaluation = 8
        config.loop.prompts_per_iteration = 8
        config.search.update(max_new_tokens=24, shard_size=8)
        config.eval.split = "validation"
    return config
