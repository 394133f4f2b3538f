"""Every method that answers at inference, on the task of `configs/smollm2.py`, at equal tokens.

Base sampling, best-of-16, IRO after one to three iterations and compressed, the reward model on
prefixes, ARGS, CARDS, controlled decoding by tokens and by blocks with values by FUDGE and by CD-Q,
Q#, value-augmented sampling. Each may use 16 candidates of 24 tokens a prompt. What needs a tuned
policy or an endpoint is told and left out, unless `--config.eval.tuned=NAME
--config.eval.untuned=NAME` and `--config.eval.endpoint.model=NAME` say where it is.

    python -m experiments.run --config=configs/rivals.py --workdir=runs/rivals
"""

from ml_collections import ConfigDict

from configs import smollm2

VARIANTS = ("", "fast")
METHODS = (
    "args",
    "args_sampled",
    "blockwise",
    "blockwise_cdq",
    "cards",
    "controlled_decoding",
    "controlled_decoding_cdq",
    "implicit_best_of_n",
    "q_sharp",
    "value_augmented",
    "weak_to_strong",
)


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"The variants of this config are {VARIANTS}. Got: {variant!r}")
    config = smollm2.get_config(variant)
    config.name = "rivals"
    config.eval.rivals = METHODS
    # Weights, temperatures and thresholds are those of the methods' papers; tokens, blocks and
    # proposals are as many as all methods may have. Nothing was chosen on these prompts.
    config.eval.split = "validation"
    return config
