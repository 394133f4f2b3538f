"""The model card of an exported value function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from iro_jax.values.function import ValueFunction
from iro_jax.values.store import opens_in_transformers


def value_card(task: str, name: str, function: ValueFunction, facts: Mapping[str, Any]) -> str:
    """The text of a `README.md`: what the function is, its data, its fit, its calibration.

    Args:
      task: what the rewards were of.
      name: of the function in its run.
      facts: `train` and `held_out` (numbers of rollouts), `curve` (lines of epoch, train_loss
        and held_out_loss), `best_epoch`, and `deciles` where calibration was measured: lines of
        predicted, observed and count.
    """
    data = ModelCardData(
        library_name="iro_jax",
        pipeline_tag="text-classification",
        base_model=function.source,
        tags=["value-function", "reward-model", "test-time-alignment"],
    )
    head, layer = function.network.head, function.network.layer
    described = "a score head" if head is None else f"a head with hidden layers {list(head.hidden)}"
    where = "the final hidden state" if layer is None else f"the hidden state after block {layer}"
    opens = (
        "`transformers.AutoModelForSequenceClassification` or `iro_jax.values`"
        if opens_in_transformers(function)
        else "`iro_jax.values`"
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"A value function of iterative reweight-then-optimize (arXiv 2506.17828) for the task"
        f" `{task}`: it maps a prompt and the beginning of an answer to the reward that the whole"
        f" answer is expected to get. It is {described} on {where}.",
        f"Open it with {opens}: `from_pretrained(folder)`. The value of a text is read at its last"
        " token, the token that ends an answer included.",
        f"## Data\n\nFitted to {facts['train']} rollouts; {facts['held_out']} rollouts of other"
        " prompts were held out.",
        "## Fit\n\n"
        + _table(("epoch", "train_loss", "held_out_loss"), facts["curve"])
        + f"\n\nThe weights are those of epoch {facts['best_epoch']}. Losses are means over"
        " rollouts of sums over their prefixes.",
    ]
    if facts.get("deciles"):
        sections.append(
            "## Calibration\n\nOn held-out prompts, by deciles of the predicted value:\n\n"
            + _table(("predicted", "observed", "count"), facts["deciles"])
        )
    return "\n\n".join(sections) + "\n"


def _table(columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    header = [f"| {' | '.join(columns)} |", "|" + "---:|" * len(columns)]
    return "\n".join(
        header + [f"| {' | '.join(cell(line[name]) for name in columns)} |" for line in lines]
    )
