"""Summaries of Reddit posts: the paper's TL;DR experiment, with Pythia models.

    python -m experiments.run --config=configs/tldr.py --workdir=runs/tldr

Variants: `:1b`, the default, and `:6.9b` are the policies of the paper. Neither was run here, so
that there is nothing to say of what they reach. These checkpoints are published as pickles, which
this library never reads, and the reward models in a layout of their own:
`python -m experiments.convert` makes folders of safetensors of them, for the flags
`--config.policy.path`, `--config.task.reward.path` (value functions start from it) and
`--config.task.judge.path`. Datasets may be local too: `--config.task.train.path=FILE`,
`--config.task.evaluation.path=FILE`.

Rivals that a log-ratio guides have the paper's tuned and untuned models in `eval.tuned` and
`eval.untuned`: `--config.eval.rivals="('implicit_best_of_n','weak_to_strong')"`. A judge behind an
endpoint compares summaries by the paper's template: `--config.eval.endpoint.model=NAME`.

`:smollm2` is for a machine with nothing: SmolLM2-135M-Instruct, short posts and summaries, a reward
model that is a linear head, trained by the run on pairs. One file with `prompt`, two summaries
`reference` and `ours_field` and `preferred` gives everything:

    python -m experiments.run --config=configs/tldr.py:smollm2 --workdir=runs/tldr_smollm2 \\
      --config.task.path=posts.jsonl

What to expect of it, in the log-odds of its own reward model, which tells 8 of 12 held-out pairs:
12 posts say little, base -0.71 (-1.03 to -0.39), best-of-16 1.77 (1.21 to 2.33), guided samples
1.38, 1.18 and 1.11 after one and two iterations and compressed, what the reward picks of them 1.69,
1.63 and 1.63. It took 27 minutes on two cores that others were using most of the time.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.base import get_base, pairs_fields, reward_fields, source_fields

VARIANTS = ("1b", "6.9b", "smollm2")
DATASET = "hf:vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
_POLICY = "vwxyzjn/EleutherAI_pythia-{}-deduped__sft__tldr@sft__44413__1708611267"
_REWARD = "vwxyzjn/EleutherAI_pythia-{}-deduped__reward__tldr@reward__44413__1706651113"
_TUNED = "vwxyzjn/EleutherAI_pythia-1b-deduped__dpo__tldr@dpo__44413__1707268320"


def get_config(variant: str = "1b") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"The variants of this config are {VARIANTS}. Got: {variant!r}")
    config = get_base()
    config.name = "tldr"
    config.search.update(max_new_tokens=53, beam_width=4, num_successors=4, chunk_length=16)
    config.search.sampling.update(temperature=0.7, top_k=50, top_p=1.0)
    config.loop.update(num_iterations=3, betas=(1.0, 1.0, 1.0), prompts_per_iteration=8192)
    config.eval.endpoint.template = "tldr"
    if variant == "smollm2":
        return _smollm2(config)
    config.policy.name = _POLICY.format(variant)
    train, evaluation = source_fields(DATASET), source_fields(DATASET)
    # Raw prompts, ending in "TL;DR:", of at most 512 tokens.
    train.update(prompt_field="query", duplicates="drop")
    evaluation.update(
        prompt_field="query", reference_field="reference_response", split="test", limit=300
    )
    config.task = ConfigDict(
        {
            "name": "prompts",
            "train": train,
            "evaluation": evaluation,
            "reward": reward_fields("model", _REWARD.format("1b")),
            # The gold reward.
            "judge": reward_fields("model", _REWARD.format("6.9b")),
        }
    )
    # The reward model itself: the first value function starts from it, head included.
    config.value.update(backbone=_REWARD.format("1b"), trainable="all", remat=True)
    config.value.head = None
    for fit in (config.value.fit, config.value.compression):
        fit.update(learning_rate=3e-6, batch_size=256, num_epochs=10, epsilon=1e-5)
        # What a part of a batch keeps for its gradient has to fit beside the weights.
        fit.micro_batches = 16
    config.eval.update(tuned=_TUNED, untuned=_POLICY.format("1b"))
    return config


def _smollm2(config: ConfigDict) -> ConfigDict:
    """The same experiment, small enough for two cores."""
    config.task = ConfigDict(
        {
            "name": "prompts",
            "path": placeholder(str),
            "train": source_fields(),
            "evaluation": source_fields(),
            "reward": pairs_fields(),
            "judge": reward_fields(),
        }
    )
    task = config.task
    for section in (task.train, task.evaluation, task.reward.pairs):
        section.path = task.get_oneway_ref("path")
    # What comes after them is evaluated on.
    task.train.update(duplicates="drop", limit=1000)
    task.evaluation.update(duplicates="drop", skip=1200, limit=12, reference_field="reference")
    task.reward.update(trainable="head", max_tokens=256, held_out=0.2)
    task.reward.pairs.update(
        chosen_field="reference",
        rejected_field="ppo_1_3b",
        preferred_field="preferred",
        preferred_values=("reference", "ours"),
        chat=False,
        limit=60,
    )
    config.search.text_format.update(max_length=192, truncation="left")
    config.search.update(stop_strings=("\n",), shard_size=8)
    config.loop.update(num_iterations=2, betas=(1.0, 1.0), prompts_per_iteration=8)
    config.value.update(layer=16, normalise=True)
    for fit in (config.value.fit, config.value.compression):
        fit.update(learning_rate=3e-3, batch_size=64, num_epochs=30, weight_decay=10.0)
    config.value.compression.weight_decay = 0.0
    config.eval.reward_on_prefixes = False
    return config
