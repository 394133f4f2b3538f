"""Pallas kernels for TPU and GPU, each with a reference in plain XLA.

Nothing here imports from `iro_jax`, which may import it.
"""

from kernels.dispatch import Implementation
from kernels.prefix_attention import Part, prefix_attention
from kernels.sampling import Drawn, fused_draw

__all__ = [
    "Drawn",
    "Implementation",
    "Part",
    "fused_draw",
    "prefix_attention",
]
