"""Memory of the host for weights that stay there.

A CPU device takes an array over as it is if it begins at a cache line. Weights are read from one
end to the other at every decoded token: side by side in huge pages they come faster, because the
processor looks up fewer addresses.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading

import numpy as np

_LINE = 64
_CHUNK_BYTES = 64 * 2**20


class HostMemory:
    """Hands out arrays that lie side by side, in huge pages where Linux has them.

    A chunk of memory is given back when none of its arrays is left. Threads may share one.
    """

    def __init__(self):
        self._chunk = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def empty(self, shape: list[int], dtype: np.dtype) -> np.ndarray:
        """An array that a CPU device can take over without a copy."""
        size = math.prod(shape) * dtype.itemsize
        reserved = -(-size // _LINE) * _LINE
        with self._lock:
            if reserved > self._chunk.size:
                self._chunk = _huge_pages(max(reserved, _CHUNK_BYTES))
            array, self._chunk = self._chunk[:size], self._chunk[reserved:]
        return array.view(dtype).reshape(shape)


def _huge_pages(size: int) -> np.ndarray:
    """Bytes that begin at a cache line. Memory that is never written to takes no place."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        memory = np.empty(size + _LINE, np.uint8)
        begin = -memory.ctypes.data % _LINE
        return memory[begin : begin + size]
    page = 2 * 2**20
    pages = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    begin = -memory.ctypes.data % page
    return memory[begin : begin + size]
