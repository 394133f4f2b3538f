r"""Problems of arithmetic and mathematics: the paper's experiment with verifiable rewards.

    python -m experiments.run --config=configs/math.py --workdir=runs/math

Variants: `:qwen2.5-3b`, the default, is the policy of the paper, with values on Qwen2.5-1.5B,
fitted by binary cross-entropy (49) to problems of GSM8K of which some samples are right and some
wrong. It was not run here, so that there is nothing to say of what it reaches. 500 problems of
GSM8K's test and MATH500 are evaluated on, each apart in `report/sets.md`; the paper's answer is the
most frequent one, `majority_of_16` and `majority_t`. Local copies: `--config.policy.path=FOLDER`,
`--config.value.backbone_path=FOLDER`, `--config.task.train.path=FILE`,
`--config.task.evaluation.gsm8k.path=FILE`, `--config.task.evaluation.math500.path=FILE`.

`:smollm2` is for a machine with nothing: SmolLM2-135M-Instruct, and heads on its own hidden states.
So small a model has to be shown how short an answer is meant, and its last number counts. Files
with `question` and `answer`, and with `prompt` and `answer`:

    python -m experiments.run --config=configs/math.py:smollm2 --workdir=runs/math_smollm2 \
      --config.task.path=train.jsonl --config.task.evaluation.math500.path=math500.jsonl

What to expect of it: that it runs, and no more. Of 384 samples for 24 problems 1% were right, of those
guided after one iteration 4%; of 12 problems to evaluate on, one was answered right by one method. It
took 24 minutes, 7 of processor time, on two cores that others were using.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.base import get_base, reward_fields, source_fields

VARIANTS = ("qwen2.5-3b", "smollm2")
GSM8K = "hf:openai/gsm8k:main"
MATH500 = "hf:HuggingFaceH4/MATH-500"
# Two examples of our own, for a model that writes on and on without.
EXAMPLES = """\
Question: Ann has 3 boxes of 4 pens and loses 2 pens. How many pens does she have?
Answer: She had 3 * 4 = 12 pens. 12 - 2 = 10. The answer is 10.

Question: Tom earns $5 an hour. He works 6 hours and spends $8. How much money is left?
Answer: He earned 5 * 6 = 30 dollars. 30 - 8 = 22. The answer is 22.

Question: {prompt}
Answer:"""
SYSTEM = "You are a helpful assistant. Put your final answer within \\boxed{}."


def get_config(variant: str = "qwen2.5-3b") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"The variants of this config are {VARIANTS}. Got: {variant!r}")
    config = get_base()
    config.name = "math"
    # K * B = 16 samples of a problem.
    config.search.update(max_new_tokens=512, beam_width=4, num_successors=4, chunk_length=8)
    # The paper names a temperature alone.
    config.search.sampling.update(temperature=0.7, top_k=None, top_p=1.0)
    # All of GSM8K's training problems in each iteration, with other draws.
    config.loop.update(
        num_iterations=2, betas=(1.0, 1.0), prompts_per_iteration=7473, mixed_only=True
    )
    config.task = ConfigDict(
        {
            "name": "prompts",
            "train": source_fields(GSM8K),
            "evaluation": {"gsm8k": source_fields(GSM8K), "math500": source_fields(MATH500)},
            "reward": reward_fields("boxed"),
            "judge": reward_fields(),
        }
    )
    task = config.task
    for section in (task.train, task.evaluation.gsm8k, task.evaluation.math500):
        section.update(prompt_field="question", reference_field="answer", chat=True, system=SYSTEM)
    task.evaluation.gsm8k.update(split="test", limit=500)
    task.evaluation.math500.update(split="test", prompt_field="problem")
    config.value.update(loss="verifiable", trainable="all", remat=True)
    config.value.head.output = "sigmoid"
    if variant == "smollm2":
        return _smollm2(config)
    config.policy.name = "Qwen/Qwen2.5-3B"
    config.value.backbone = "Qwen/Qwen2.5-1.5B"
    for fit in (config.value.fit, config.value.compression):
        fit.update(learning_rate=3e-6, batch_size=256, num_epochs=10, epsilon=1e-5)
        # What a part of a batch keeps for its gradient has to fit beside the weights.
        fit.micro_batches = 16
    return config


def _smollm2(config: ConfigDict) -> ConfigDict:
    """The same experiment, small enough for two cores."""
    task = config.task
    task.path = placeholder(str)
    for section in (task.train, *task.evaluation.values()):
        section.update(source="", system=None, chat=False, template=EXAMPLES)
    for section in (task.train, task.evaluation.gsm8k):
        section.path = task.get_oneway_ref("path")
    # The last problems of the file are not trained on.
    task.train.limit = 7000
    task.evaluation.gsm8k.update(skip=7000, limit=8)
    task.evaluation.math500.update(prompt_field="prompt", limit=4)
    task.reward.kind = "number"
    config.search.text_format.update(max_length=256, truncation="left")
    config.search.update(max_new_tokens=32, stop_strings=("\n",), shard_size=8)
    config.loop.update(prompts_per_iteration=24, compress=False)
    config.value.update(trainable="head", layer=16)
    for fit in (config.value.fit, config.value.compression):
        fit.update(learning_rate=1e-3, batch_size=64, num_epochs=20, weight_decay=1e-1)
    return config
