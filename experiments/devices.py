"""Where a run's networks lie: `config.mesh`."""

from __future__ import annotations

import dataclasses
import logging

from jax.sharding import Mesh
from ml_collections import ConfigDict

from iro_jax import hosts
from iro_jax.models import Pretrained, from_pretrained
from iro_jax.models.sharding import REPLICATED, RULES, Rules, num_shards

_VALUE_RULES: dict[str, Rules] = {"split": RULES, "replicated": REPLICATED}


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run; by default one.

    Attributes:
      mesh: over those of all hosts, for fits.
      own: over this host's, for everything else.
      value_rules: how value networks and reward models are split.
    """

    mesh: Mesh | None = None
    own: Mesh | None = None
    value_rules: Rules = RULES

    def load_policy(self, name: str, dtype: str | None = None) -> Pretrained:
        """The policy: see `iro_jax.models.from_pretrained`."""
        return from_pretrained(name, dtype=dtype, mesh=self.own)

    def load(self, name: str, dtype: str | None = None) -> Pretrained:
        """Any other network."""
        return from_pretrained(name, dtype=dtype, mesh=self.own, rules=self.value_rules)


def devices_of(config: ConfigDict) -> Devices:
    """The devices that `config.mesh` asks for.

    Raises:
      ValueError: they are not there, or the section has unknown values.
    """
    chosen, rules = config.mesh, value_rules(config)
    mesh = hosts.global_mesh(chosen.data, chosen.fsdp, chosen.model)
    own = hosts.local_mesh(mesh)
    share = 1 if own is None else num_shards("batch", own)
    if config.search.batch_size % share:
        logging.warning(
            "search.batch_size=%d is not a multiple of the %d parts of the mesh that share prompts:"
            " every part searches all of them",
            config.search.batch_size,
            share,
        )
    return Devices(mesh, own, rules)


def value_rules(config: ConfigDict) -> Rules:
    """How `config.mesh.values` says that value networks and reward models are split.

    Raises:
      ValueError: it is no way that there is.
    """
    # `values` is also a method of a ConfigDict.
    chosen = config.mesh["values"]
    if chosen not in _VALUE_RULES:
        raise ValueError(f"mesh.values must be one of {tuple(_VALUE_RULES)}. Got: {chosen!r}")
    return _VALUE_RULES[chosen]
