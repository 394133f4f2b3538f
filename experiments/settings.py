"""From the sections of a configuration to the settings of the library."""

from __future__ import annotations

import functools
import re

from ml_collections import ConfigDict

from experiments.tasks import value_head
from iro_jax.collect import SearchSettings
from iro_jax.iro import LoopSettings
from iro_jax.models import Sampling, TextFormat
from iro_jax.schedules import betas
from iro_jax.search import SelectFn, diversity_first, per_parent, stochastic, top_k
from iro_jax.values import FitSettings, ValueSettings

_SELECTIONS: dict[str, SelectFn] = {
    "diversity_first": diversity_first,
    "top_k": top_k,
    "per_parent": per_parent,
}


def search_settings(config: ConfigDict) -> SearchSettings:
    """`config.search`."""
    chosen = config.search.to_dict()
    sampling = Sampling(**chosen.pop("sampling"))
    text_format = TextFormat(**chosen.pop("text_format"))
    chosen["stop_strings"] = tuple(chosen["stop_strings"])
    chosen["select_fn"] = _select_fn(chosen.pop("select"))
    return SearchSettings(**chosen, sampling=sampling, text_format=text_format, seed=config.seed)


def _select_fn(name: str) -> SelectFn:
    """A selection by its name; `stochastic@0.5` has a temperature."""
    kind, _, temperature = name.partition("@")
    if kind == "stochastic" and re.fullmatch(r"\d*\.?\d+", temperature) and float(temperature):
        return functools.partial(stochastic, temperature=float(temperature))
    if name not in _SELECTIONS:
        known = (*_SELECTIONS, "stochastic@TEMPERATURE")
        raise ValueError(f"select must be one of {known}. Got: {name!r}")
    return _SELECTIONS[name]


def loop_settings(config: ConfigDict) -> LoopSettings:
    """`config.loop`."""
    chosen = config.loop.to_dict()
    select = chosen.pop("select")
    chosen["select_fn"] = None if select is None else _select_fn(select)
    of_each = betas(chosen.pop("betas"), chosen.pop("num_iterations"))
    return LoopSettings(**chosen, betas=tuple(of_each), seed=config.seed)


def value_settings(config: ConfigDict) -> ValueSettings:
    """`config.value`."""
    chosen = config.value.to_dict()
    chosen.pop("backbone")
    chosen.pop("backbone_path")
    chosen.pop("next_tokens")
    chosen["head"] = value_head(config.value)
    compression = chosen.pop("compression")
    chosen["targets"] = tuple(chosen["targets"])
    return ValueSettings(
        **chosen | {"fit": FitSettings(**chosen["fit"], seed=config.seed)},
        compression=None if compression is None else FitSettings(**compression, seed=config.seed),
        seed=config.seed,
    )
