"""Memory of weights: arrays side by side that CPU devices take over as they are."""

import gc

import jax
import numpy as np

from iro_jax.models.weights.memory import _CHUNK_BYTES, HostMemory

SHAPES = [[3], [5, 7], [0], [_CHUNK_BYTES // 4 + 1], [576, 64], [1]]


def test_arrays_keep_what_is_written_when_the_memory_is_gone():
    memory = HostMemory()
    arrays = [memory.empty(shape, np.dtype(np.float32)) for shape in SHAPES]
    for number, array in enumerate(arrays):
        array[...] = number
    del memory
    gc.collect()
    for number, (array, shape) in enumerate(zip(arrays, SHAPES, strict=True)):
        assert list(array.shape) == shape
        assert np.all(array == number)


def test_types_follow_each_other_at_cache_lines():
    memory = HostMemory()
    for dtype in ("bfloat16", "float32", "int8"):
        array = memory.empty([33], jax.numpy.dtype(dtype))
        assert array.dtype == dtype
        assert array.ctypes.data % 64 == 0


def test_a_cpu_device_copies_nothing():
    array = HostMemory().empty([4, 5], np.dtype(np.float32))
    array[...] = 2
    assert jax.device_put(array, jax.devices("cpu")[0]).unsafe_buffer_pointer() == array.ctypes.data
