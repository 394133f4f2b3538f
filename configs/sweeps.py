"""The paper's ablations, on the task of `configs/smollm2.py` with 64 validation prompts.

    python -m experiments.sweep --config=configs/sweeps.py:chunk_length

Variants: `beta` of the second iteration; `chunk_length` from short ones to the whole answer;
`data` (chunk length by prompts an iteration); `candidates` U with K = B; `selection`;
`value_size`; `reward_quality` (reward models from more and more reviews); `value_loss` with the
paper's grid of TD and GAE.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import smollm2

Points = dict[str, dict[str, Any]]


def _beta() -> Points:
    # A constant factor of all betas changes nothing: only the ratio of the two does.
    return {
        f"beta_2 = {beta:g}": {"loop.betas": (1.0, beta), "loop.num_iterations": 2}
        for beta in (0.25, 0.5, 1.0, 2.0, 4.0)
    }


def _chunk_length() -> Points:
    return {f"L = {length}": {"search.chunk_length": length} for length in (1, 2, 4, 8, 12, 24)}


def _data() -> Points:
    return {
        f"L = {length}, m = {prompts}": {
            "search.chunk_length": length,
            "loop.prompts_per_iteration": prompts,
        }
        for length in (2, 4, 8)
        for prompts in (8, 16, 32, 64)
    }


def _candidates() -> Points:
    return {
        f"U = {size * size}": {"search.beam_width": size, "search.num_successors": size}
        for size in (2, 3, 4, 5)
    }


def _selection() -> Points:
    names = ["diversity_first", "top_k", "per_parent"]
    names += [f"stochastic@{temperature:g}" for temperature in (0.25, 0.5, 1.0, 2.0)]
    return {name: {"search.select": name} for name in names}


def _value_size() -> Points:
    linear = {"linear head": {"value.head.hidden": ()}}
    return linear | {
        f"hidden layer of {width}": {"value.head.hidden": (width,), "loop.warm_start": False}
        for width in (32, 128, 512)
    }


def _reward_quality() -> Points:
    return {f"{n} reviews": {"task.num_reward_reviews": n} for n in (200, 600, 1500, 3000)}


def _value_loss() -> Points:
    # Gamma discounts towards zero, which has to be the rewards' own.
    plain = {"value.normalise": False}
    points: Points = {
        "Monte Carlo": {**plain, "value.loss": "monte_carlo"},
        "TD, lambda = .99": {**plain, "value.loss": "td_lambda", "value.lam": 0.99},
    }
    for gamma in (1.0, 0.99, 0.98, 0.97, 0.95):
        points[f"GAE, gamma = {gamma:g}"] = {
            **plain,
            "value.loss": "gae",
            "value.lam": 1.0,
            "value.gamma": gamma,
        }
    return points


SWEEPS = {
    "beta": ("Beta of the second iteration", _beta),
    "chunk_length": ("Chunk length", _chunk_length),
    "data": ("Chunk length by data", _data),
    "candidates": ("Candidates, K = B", _candidates),
    "selection": ("Selection", _selection),
    "value_size": ("Size of the value functions", _value_size),
    "reward_quality": ("Reviews behind the reward model", _reward_quality),
    "value_loss": ("Loss of the value functions", _value_loss),
}
VARIANTS = tuple(SWEEPS)


def get_config(variant: str = "chunk_length") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"The variants of this config are {VARIANTS}. Got: {variant!r}")
    title, points = SWEEPS[variant]
    config = smollm2.get_config()
    config.name = f"sweep_{variant}"
    config.task.num_evaluation = 64
    config.loop.update(num_iterations=2, compress=False)
    config.eval.update(split="validation", reward_on_prefixes=False)
    fields = tuple((label, tuple(changes.items())) for label, changes in points().items())
    return ConfigDict({"name": variant, "title": title, "points": fields, "run": config})
