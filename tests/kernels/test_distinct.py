"""What of a matrix's rows the products on CPUs take for one: `cpu/distinct.h`, compiled alone."""

import ctypes
import os
import shutil
import subprocess

import numpy as np
import pytest

from kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")

PROGRAM = """
#include "distinct.h"

// The row of which each is a copy, or itself.
extern "C" void Originals(const float* x, int64_t m, int64_t k, int32_t* originals) {
  const iro_jax::Distinct distinct(x, m, k);
  for (int32_t row : distinct.rows()) originals[row] = row;
  for (const auto& copy : distinct.copies()) originals[copy.row] = copy.of;
}
"""


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distinct")
    (folder / "program.cc").write_text(PROGRAM)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    command = [*str(compiler).split(), *native._FLAGS, "-I", str(native._FOLDER)]
    subprocess.run(
        [*command, str(folder / "program.cc"), "-o", str(folder / "program.so")], check=True
    )
    library = ctypes.CDLL(str(folder / "program.so"))

    def find(x):
        x = np.ascontiguousarray(x, np.float32)
        found = np.full(len(x), -1, np.int32)
        sizes = map(ctypes.c_int64, x.shape)
        library.Originals(x.ctypes.data_as(ctypes.c_void_p), *sizes, found.ctypes)
        return found

    return find


def first_equal(x):
    """By brute force."""
    return [
        next(j for j in range(i + 1) if x[j].tobytes() == x[i].tobytes()) for i in range(len(x))
    ]


@pytest.mark.parametrize("width", [1, 7, 8, 9, 576])
@pytest.mark.parametrize("kinds", [1, 5, 64, 1000])
def test_all_equal_rows_are_found(originals, kinds, width):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(kinds, width)).astype("f")[rng.integers(0, kinds, 300)]
    np.testing.assert_array_equal(originals(x), first_equal(x))


def test_what_differs_in_one_number_is_not_equal(originals):
    x = np.zeros((577, 576), "f")
    x[np.arange(576), np.arange(576)] = 1e-30
    x[576, 0] = -0.0
    np.testing.assert_array_equal(originals(x), np.arange(577))


def test_rows_that_only_look_alike_take_no_time_to_speak_of(originals):
    # Of numbers that the hash does not see: a search among all of them would take minutes.
    x = np.zeros((50_000, 1000), "f")
    x[:, 999] = np.arange(50_000)
    found = originals(x)
    np.testing.assert_array_equal(found, np.arange(50_000))
