"""Instruction following: the paper's UltraFeedback experiment, with Llama 3 as the policy.

    python -m experiments.run --config=configs/ultrafeedback.py --workdir=runs/ultrafeedback

Variants: `:8b`, the default, and `:70b` are the policies of the paper, with values on Mistral 7B,
whose tokenizer is another one. Neither was run here, so that there is nothing to say of what they
reach. As in the paper, the reward model is trained from pairs of UltraFeedback, all weights of
`HuggingFaceH4/mistral-7b-sft-beta`, and the value functions start from it. It is a stage of the
run; it may also be trained before, on a machine without the policy:

    python -m experiments.train_reward --config=configs/ultrafeedback.py \\
      --workdir=runs/ultrafeedback_reward
    python -m experiments.run --config=configs/ultrafeedback.py --workdir=runs/ultrafeedback \\
      --config.task.reward.path=runs/ultrafeedback_reward/reward/export

`--config.task.reward.path` takes any other reward model as well, such as a local copy of
`sfairXC/FsfairX-LLaMA3-RM-v0.1`. Local copies of the rest: `--config.policy.path=FOLDER`,
`--config.value.backbone_path=FOLDER`, `--config.task.train.path=FILE`,
`--config.task.evaluation.path=FILE`, `--config.task.reward.pairs.path=FILE`.
`eval/<method>/outputs.jsonl` can be judged by `alpaca_eval`, as in the paper. The paper's tuned and
untuned models, in `eval.tuned` and `eval.untuned`, do not have the policy's tokenizer: rivals that
a log-ratio guides are left out.

`:smollm2` is for a machine with nothing: SmolLM2-135M-Instruct and answers of 48 tokens, and for a
reward model a linear head, trained by the run on pairs. A file of pairs (`prompt`, `chosen`,
`rejected`) and one of prompts to evaluate on (`instruction`, `reference`):

    python -m experiments.run --config=configs/ultrafeedback.py:smollm2 \\
      --workdir=runs/ultrafeedback_smollm2 --config.task.path=pairs.jsonl \\
      --config.task.evaluation.path=prompts_805.jsonl

What to expect of it, in the log-odds of its own reward model, which tells 6 of 12 held-out pairs,
no more than chance: 12 prompts say little, base -0.01 (-0.24 to 0.22), best-of-16 2.52 (2.14 to
2.88), guided samples 1.35, 1.60 and 1.99 after one and two iterations and compressed, what the
reward picks of them 2.78, 3.13 and 2.90. Its stages took 14 minutes on two cores that others were
using.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.base import get_base, pairs_fields, reward_fields, source_fields

VARIANTS = ("8b", "70b", "smollm2")
PAIRS = "hf:HuggingFaceH4/ultrafeedback_binarized"
# What AlpacaEval 2 compares with: 805 instructions with answers of GPT-4 Turbo.
PROMPTS = "hf:tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json"
_POLICY = "meta-llama/Meta-Llama-3-{}-Instruct"


def get_config(variant: str = "8b") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"The variants of this config are {VARIANTS}. Got: {variant!r}")
    config = get_base()
    config.name = "ultrafeedback"
    config.search.update(max_new_tokens=2048, beam_width=4, num_successors=4, chunk_length=16)
    config.search.sampling.update(temperature=0.6, top_k=50, top_p=0.9)
    # Not the paper's: its longest prompts are cut, from their beginning.
    config.search.text_format.update(max_length=2048, truncation="left")
    config.loop.update(num_iterations=3, betas=(1.0, 2.0, 2.5), prompts_per_iteration=8192)
    config.task = ConfigDict(
        {
            "name": "prompts",
            "train": source_fields(PAIRS),
            "evaluation": source_fields(PROMPTS),
            "reward": pairs_fields(PAIRS),
            "judge": reward_fields(),
        }
    )
    config.task.train.update(chat=True, duplicates="drop", split="train_prefs")
    config.task.evaluation.update(
        prompt_field="instruction", reference_field="output", chat=True, duplicates="drop"
    )
    config.task.reward.pairs.split = "train_prefs"
    config.task.reward.fit.update(learning_rate=5e-6, num_epochs=3, micro_batches=16)
    if variant == "smollm2":
        return _smollm2(config)
    config.policy.update(name=_POLICY.format(variant.upper()), dtype="bfloat16")
    # So many accelerators of a host share weights and caches of the policy and of the three value
    # networks; more of them share the prompts. What fits where: experiments/plan/README.md.
    config.mesh.model = 4 if variant == "70b" else 8
    # The reward model is trained from it; the first value function starts from that.
    config.value.update(
        backbone="HuggingFaceH4/mistral-7b-sft-beta",
        trainable="all",
        remat=True,
        dtype="bfloat16",
    )
    config.value.head = None
    for fit in (config.value.fit, config.value.compression):
        fit.update(learning_rate=3e-6, batch_size=512, num_epochs=10, epsilon=1e-5)
        # What a part of a batch keeps for its gradient has to fit beside the weights.
        fit.micro_batches = 64
    config.eval.update(
        tuned="HuggingFaceH4/zephyr-7b-beta", untuned="HuggingFaceH4/mistral-7b-sft-beta"
    )
    return config


def _smollm2(config: ConfigDict) -> ConfigDict:
    """The same experiment, small enough for two cores."""
    task = config.task
    task.path = placeholder(str)
    for section in (task.train, task.reward.pairs):
        section.source = ""
        section.path = task.get_oneway_ref("path")
        section.split = "train"
    # Its own file has no other prompts; those of the pairs come before.
    task.train.skip = 600
    task.evaluation.update(source="", reference_field="reference", limit=12)
    task.reward.update(trainable="head", max_tokens=256, held_out=0.2)
    task.reward.pairs.limit = 60
    config.search.text_format.max_length = 128
    config.search.update(max_new_tokens=48, shard_size=8)
    config.loop.update(num_iterations=2, betas=(1.0, 2.0), prompts_per_iteration=8)
    config.value.update(layer=16, normalise=True)
    for fit in (config.value.fit, config.value.compression):
        fit.update(learning_rate=3e-3, batch_size=64, num_epochs=30, weight_decay=10.0)
    config.value.compression.weight_decay = 0.0
    config.eval.reward_on_prefixes = False
    return config
