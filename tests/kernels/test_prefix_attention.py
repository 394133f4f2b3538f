"""Attention over prompt, beams and chunk equals a softmax over what each query sees, in f64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kernels import Part, prefix_attention
from kernels.prefix_attention import reference
from kernels.prefix_attention_gpu import gpu_kernel
from kernels.prefix_attention_tpu import Blocks, tpu_kernel

IMPLEMENTATIONS = {
    "xla": reference,
    "tpu": functools.partial(tpu_kernel, interpret=True, block_slots=128),
    "gpu": functools.partial(gpu_kernel, interpret=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes by the module's letters; `hidden` is the fraction of slots that are empty."""

    P: int = 2
    K: int = 2
    B: int = 2
    heads: int = 2
    G: int = 4
    D: int = 64
    S: int = 32
    T: int = 48
    L: int = 4
    cursor: int = 48
    hidden: float = 0.2
    window: int | None = None
    softcap: float | None = None
    dtype: str = "float32"

    @property
    def options(self):
        return {"window": self.window, "softcap": self.softcap}

    def arrays(self, seed=0):
        """The positional arguments of `prefix_attention`."""
        rng = np.random.default_rng(seed)
        lead = (self.P, self.K, self.B)

        def normal(*shape, scale=1.0):
            return jnp.asarray(rng.normal(size=shape) * scale, self.dtype)

        def part(axes, slots, used):
            positions = rng.integers(0, 100, (*lead[:axes], slots))
            empty = rng.random(positions.shape) < self.hidden
            positions = np.where(empty | (np.arange(slots) >= used), -1, positions)
            shape = (*lead[:axes], self.heads, slots, self.D)
            return Part(normal(*shape), normal(*shape), jnp.asarray(positions, jnp.int32))

        return (
            normal(*lead, self.heads, self.G, self.D, scale=self.D**-0.5),
            jnp.asarray(rng.integers(60, 100, lead), jnp.int32),
            part(1, self.S, self.S),
            part(2, self.T, self.cursor),
            part(3, self.L, self.L),
            jnp.int32(self.cursor),
        )


CASES = {
    "one of everything": Case(P=1, K=1, B=1, heads=1, G=1, S=1, T=1, L=1, cursor=1, hidden=0),
    "odd sizes": Case(K=3, heads=3, G=3, D=80, S=37, T=51, L=5, cursor=33),
    "several blocks": Case(P=1, G=1, D=128, S=200, T=300, cursor=150),
    "more rows than a tile": Case(P=1, K=5, B=4, heads=1),
    "more slots than a split": Case(P=1, K=1, heads=1, S=600, T=530, cursor=530),
    "empty beams": Case(cursor=0),
    "no beam slots": Case(T=0, cursor=0),
    "window": Case(window=20),
    "window and softcap, eight heads a group": Case(G=8, D=128, window=7, softcap=2.0),
    "mostly hidden": Case(hidden=0.95),
    "bf16": Case(G=3, D=128, dtype="bfloat16"),
}


def expected(queries, query_positions, prompt, beams, chunk, cursor, window=None, softcap=None):
    """Query by query."""
    del cursor
    cast = functools.partial(np.asarray, dtype=np.float64)
    out = np.zeros(queries.shape)
    for p, k, b, h, g in np.ndindex(queries.shape[:-1]):
        cells = ((prompt, (p,)), (beams, (p, k)), (chunk, (p, k, b)))
        keys, values = (
            np.concatenate([cast(part[i][cell][h]) for part, cell in cells]) for i in (0, 1)
        )
        positions = np.concatenate([part.positions[cell] for part, cell in cells])
        here = int(query_positions[p, k, b])
        earliest = 0 if window is None else here - window + 1
        seen = [s for s, at in enumerate(positions) if max(earliest, 0) <= at <= here]
        if not seen:
            continue
        scores = keys[seen] @ cast(queries[p, k, b, h, g])
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[p, k, b, h, g] = weights @ values[seen] / weights.sum()
    return out


# What the GPU kernel does differently: padding, tiles of rows and splits of slots.
GPU_CASES = ("odd sizes", "more rows than a tile", "more slots than a split", "bf16")


@pytest.mark.parametrize(
    ("implementation", "name"),
    [(fn, name) for fn in IMPLEMENTATIONS for name in CASES if fn != "gpu" or name in GPU_CASES],
)
def test_equals_a_softmax_over_what_is_visible(implementation, name):
    case = CASES[name]
    arrays = case.arrays()
    if implementation == "xla":
        fn = functools.partial(prefix_attention, implementation="xla")
    elif case.T == 0:
        fn = functools.partial(prefix_attention, implementation="interpret")
    else:
        fn = IMPLEMENTATIONS[implementation]
    found = jax.jit(functools.partial(fn, **case.options))(*arrays)
    assert found.dtype == jnp.float32
    tolerance = 2e-2 if case.dtype == "bfloat16" else 5e-6
    np.testing.assert_allclose(
        found, expected(*arrays, **case.options), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_gets_zeros(implementation):
    queries, positions, *rest = Case().arrays()
    positions = positions.at[0, 1, 1].set(-1)
    found = jax.jit(IMPLEMENTATIONS[implementation])(queries, positions, *rest)
    np.testing.assert_array_equal(found[0, 1, 1], 0)
    assert np.all(np.any(np.asarray(found[1]) != 0, axis=-1))


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize("cursor", [0, 100])
def test_blocks_beyond_the_cursor_are_not_looked_at(implementation, cursor):
    """They hold NaN at visible positions; the cursor's own block is empty beyond it."""
    case = Case(P=1, T=300, cursor=cursor)
    queries, positions, prompt, beams, chunk, used = case.arrays()
    later = np.arange(300) >= 128
    poisoned = Part(
        keys=jnp.where(later[:, None], jnp.nan, beams.keys),
        values=jnp.where(later[:, None], jnp.nan, beams.values),
        positions=jnp.where(later, 1, beams.positions),
    )
    found = jax.jit(IMPLEMENTATIONS[implementation])(
        queries, positions, prompt, poisoned, chunk, used
    )
    want = expected(queries, positions, prompt, beams, chunk, used)
    np.testing.assert_allclose(found, want, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize(("cursor", "used"), [(0, 0), (1, 1), (128, 1), (129, 2), (1000, 8)])
def test_each_block_is_fetched_once(cursor, used):
    """A block is fetched when its index differs from the step before."""
    blocks = Blocks(heads=1, prompt_block=128, beam_block=128, prompt_slots=300, beam_slots=1000)
    width = 3
    steps = range(blocks.steps(width))
    prompts = [int(blocks.loaded_prompt(step)) for step in steps]
    beams = [tuple(map(int, blocks.loaded_beam(step, cursor))) for step in steps]

    def fetched(sequence):
        return [x for x, before in zip(sequence, [None, *sequence], strict=False) if x != before]

    assert fetched(prompts) == [0, 1, 2]
    filled = [(beam, block) for beam in range(width) for block in range(used)]
    assert fetched(beams) == (filled or [(0, 0)])


def test_spread_over_a_mesh_it_computes_the_same():
    case = Case(heads=4, G=1, S=8, T=8, cursor=8)
    arrays = case.arrays()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def spec(x, axes):
        heads = ("model",) if x.ndim > axes + 1 else ()
        return PartitionSpec("data", *(None,) * (axes - 1), *heads)

    queries, positions, *parts, _ = arrays
    specs = (
        spec(queries, 3),
        spec(positions, 3),
        *(
            jax.tree.map(functools.partial(spec, axes=axes), part)
            for axes, part in enumerate(parts, start=1)
        ),
        PartitionSpec(),
    )
    for implementation in ("auto", "interpret"):
        fn = functools.partial(prefix_attention, implementation=implementation)
        # The interpreter does not keep account of the axes that its own arrays vary over.
        spread = jax.shard_map(
            fn,
            mesh=mesh,
            in_specs=specs,
            out_specs=specs[0],
            check_vma=implementation == "auto",
        )
        found = jax.jit(spread)(*arrays)
        np.testing.assert_allclose(found, reference(*arrays), atol=2e-6, rtol=2e-6)


def test_shapes_and_types_that_do_not_fit_are_refused():
    queries, positions, prompt, beams, chunk, cursor = Case().arrays()
    low = beams._replace(keys=beams.keys.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"beams's keys .* dtype float32.*Got: bfloat16"):
        prefix_attention(queries, positions, prompt, low, chunk, cursor)
    with pytest.raises(ValueError, match=r"prompt's keys .* shape"):
        prefix_attention(queries, positions, beams, beams, chunk, cursor)
    with pytest.raises(ValueError, match="query_positions"):
        prefix_attention(queries, positions[:1], prompt, beams, chunk, cursor)
    with pytest.raises(ValueError, match=r"implementation must be one of.*Got: 'cpu'"):
        prefix_attention(*Case().arrays(), implementation="cpu")
