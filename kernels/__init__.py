"""Pallas kernels for TPU and GPU and C++ ones for CPUs, each with a reference in plain XLA.

Nothing here imports from `iro_jax`, which may import it.
"""

from kernels.coded import Coded, encode, matmul_coded
from kernels.dispatch import Implementation
from kernels.matmul import matmul, matmul_transposed
from kernels.prefix_attention import prefix_attention
from kernels.prefix_attention_parts import Part
from kernels.sampling import fused_draw
from kernels.sampling_algorithm import Drawn

__all__ = [
    "Coded",
    "Drawn",
    "Implementation",
    "Part",
    "encode",
    "fused_draw",
    "matmul",
    "matmul_coded",
    "matmul_transposed",
    "prefix_attention",
]
