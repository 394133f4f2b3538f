"""Value functions: networks and heads that map a prefix to its expected final reward."""

from iro_jax.values.fit import Epoch, FitError, FitSettings, fit
from iro_jax.values.fitter import FittedFunction, ValueFitter, ValueSettings
from iro_jax.values.function import (
    AnswerTokens,
    ValueFunction,
    merge_adapters,
    new_head,
    standalone,
    with_adapters,
)
from iro_jax.values.heads import Head, HeadParams, select, stack
from iro_jax.values.network import ValueMemory, ValueNetwork, ValueParams
from iro_jax.values.next_states import NextStates
from iro_jax.values.prefixes import StateCache, prefix_values
from iro_jax.values.reading import StateReader
from iro_jax.values.recomputed import AnyMemory, AnyNetwork, RecomputedNetwork, TokenMemory
from iro_jax.values.rewards import FunctionReward
from iro_jax.values.stacked import StackedMemory, StackedNetworks, stack_networks
from iro_jax.values.store import from_pretrained, save_value

__all__ = [
    "AnswerTokens",
    "AnyMemory",
    "AnyNetwork",
    "Epoch",
    "FitError",
    "FitSettings",
    "FittedFunction",
    "FunctionReward",
    "Head",
    "HeadParams",
    "NextStates",
    "RecomputedNetwork",
    "StackedMemory",
    "StackedNetworks",
    "StateCache",
    "StateReader",
    "TokenMemory",
    "ValueFitter",
    "ValueFunction",
    "ValueMemory",
    "ValueNetwork",
    "ValueParams",
    "ValueSettings",
    "fit",
    "from_pretrained",
    "merge_adapters",
    "new_head",
    "prefix_values",
    "save_value",
    "select",
    "stack",
    "stack_networks",
    "standalone",
    "with_adapters",
]
