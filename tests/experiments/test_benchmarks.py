"""What the scripts of `experiments/benchmarks` count and compute around their measurements."""

import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import common, floor
from iro_jax.testing import tiny_network

ROOT = Path(__file__).parent.parent.parent
MODULE = "experiments.benchmarks."


def python(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def matrices(params):
    """Scalars of the layers' weight matrices."""
    return sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim > 1)


def test_the_floor_computes_every_product():
    params = tiny_network().init(jax.random.key(0))
    x = jnp.ones((3, 16))  # few enough for XLA, which cannot count what kernels do
    program = jax.jit(floor.layer_matmuls).lower(params, x).compile()
    assert program.cost_analysis()["flops"] == pytest.approx(2 * 3 * matrices(params), rel=1e-2)


def test_all_rows_of_the_floor_differ():
    params = tiny_network().init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (16, 16))
    sizes = {"candidates": 32, "chunk_length": 4, "num_chunks": 3}
    tokens, [chunks] = floor.search_matmuls(params, (params,), x, **sizes)
    for rows in (tokens, chunks):
        assert len(np.unique(rows, axis=0)) == len(rows)
    assert [tokens.shape, chunks.shape] == [(32, 16), (128, 16)]


def test_the_floor_of_a_search_reads_each_value_network():
    params = tiny_network().init(jax.random.key(0))

    def products(networks):
        def program(policy, values, x):
            return floor.search_matmuls(
                policy, values, x, candidates=1, chunk_length=3, num_chunks=2
            )

        lowered = jax.jit(program).lower(params, (params,) * networks, jnp.ones((3, 16)))
        return lowered.compile().as_text().count(" dot(")

    layers = 4 * tiny_network().config.num_layers
    assert [products(n + 1) - products(n) for n in range(2)] == [2 * layers, 2 * layers]


def test_memory_counts_every_argument():
    x = jnp.ones((1000, 100))
    program = jax.jit(lambda x, y: x @ y.T).lower(x, x).compile()
    found = common.memory(program)
    assert found["arguments"] == 2 * x.nbytes
    assert found["outputs"] == 4 * 1000 * 1000


def test_programs_take_turns():
    order = []
    common.medians({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2)
    assert "".join(order) == "ababab"


# Scripts define their flags on import, some by the same names: each has a process of its own.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["answer_length", "value_functions", "search_memory", "second_start", "accelerator"]
)
def test_examples(name):
    code = (
        "import doctest, importlib\n"
        f"result = doctest.testmod(importlib.import_module({MODULE + name!r}))\n"
        "raise SystemExit(result.failed or not result.attempted)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_accelerator_runs_anywhere(tmp_path):
    sizes = ["--prompts=1", "--samples=2", "--length=10", "--tokens=16", "--rounds=1"]
    table = tmp_path / "table.md"
    done = python("-m", MODULE + "accelerator", "--small", *sizes, f"--out={table}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|") for line in table.read_text().splitlines() if "sampling" in line]
    assert [float(rows[0][4].replace(",", "")) > 0] == [True]


def test_bytes_of_a_search():
    # In a process of its own as well.
    code = (
        "from experiments.benchmarks.accelerator import Reader, random_reader, search_bytes\n"
        "from experiments.benchmarks.common import unguided\n"
        "from iro_jax.testing import tiny_config\n"
        "reader = random_reader(tiny_config(), 0)\n"
        "search = unguided(reader.network, 3)\n"
        "print(search_bytes(reader, None, search, 2, 5))\n"
        "print(reader.weight_bytes, reader.slot_bytes)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    total, weights, slot = map(int, done.stdout.split())
    assert slot == 2 * 2 * 2 * 8 * 4
    network = tiny_network()
    params = network.abstract_params()
    embedding = network.config.vocab_size * network.config.embed_dim
    scalars = sum(math.prod(x.shape) for x in jax.tree.leaves(params)) - embedding
    assert weights == 4 * scalars
    # The prompts, and three steps at which 6, 7 and 8 slots of two sequences are filled.
    assert total == 4 * weights + 2 * (6 + 7 + 8) * slot
