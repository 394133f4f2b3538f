"""Value functions: networks and heads that map a prefix to its expected final reward."""

from iro_jax.values.heads import Head, HeadParams
from iro_jax.values.network import ValueMemory, ValueNetwork, ValueParams

__all__ = ["Head", "HeadParams", "ValueMemory", "ValueNetwork", "ValueParams"]
