"""Curves of a run: TensorBoard, and Weights & Biases where it is asked for.

What a run decides by lies in its manifest; this is for watching it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iro_jax import hosts

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class Metrics:
    """Writes numbers by name and step.

    Args:
      folder: for TensorBoard.
      wandb_project: also goes there; needs the package `wandb` and its login.
      run_id: by which a continued run finds its curves there again.
      config: shown with the run there.

    Raises:
      ImportError: `wandb` is wanted and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        wandb_project: str | None = None,
        run_id: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._folder = folder
        self._wandb: Any = None
        if wandb_project is not None and hosts.first():
            try:
                import wandb
            except ImportError as error:
                raise ImportError(
                    "Logging to Weights & Biases needs its package: `pip install wandb`"
                ) from error
            self._wandb = wandb.init(
                project=wandb_project,
                config=dict(config or {}),
                resume="allow",
                id=run_id,
            )

    @functools.cached_property
    def _board(self) -> SummaryWriter:
        # Imports PyTorch where it is installed, which takes seconds: not before there are numbers.
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self._folder))

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a point to the curve `stage/name` of each number; the first host does."""
        if not hosts.first():
            return
        for name, number in numbers.items():
            self._board.add_scalar(f"{stage}/{name}", number, step)
        if self._wandb is not None:
            self._wandb.log({f"{stage}/{name}": number for name, number in numbers.items()})
        self._board.flush()

    def close(self) -> None:
        if "_board" in vars(self):
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
