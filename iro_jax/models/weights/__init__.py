"""Checkpoints on disk: safetensors folders, GGUF files, packages and hub names."""

from iro_jax.models.weights.checkpoint import Checkpoint, CheckpointError
from iro_jax.models.weights.load import Pretrained, from_pretrained, save_pretrained
from iro_jax.models.weights.safetensors_folder import staged_folder
from iro_jax.models.weights.sources import HubError, locate, open_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "HubError",
    "Pretrained",
    "from_pretrained",
    "locate",
    "open_checkpoint",
    "save_pretrained",
    "staged_folder",
]
