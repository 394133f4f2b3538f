"""Networks without keys and values say what reading every prefix from its beginning says."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.models.lora import init_adapters
from iro_jax.testing import tiny_network
from iro_jax.values import Head, RecomputedNetwork, ValueNetwork, ValueParams

WIDTH, SUCCESSORS, LENGTH, SLOTS = 3, 2, 4, 12
SIZES = {
    "beam_width": WIDTH,
    "num_successors": SUCCESSORS,
    "chunk_length": LENGTH,
    "beam_slots": SLOTS,
}
BACKBONE, SCORING = tiny_network(), tiny_network(head="score")


def larger(params):
    return jax.tree.map(lambda x: 8 * x, params)


def scoring():
    return ValueNetwork(SCORING), ValueParams(larger(SCORING.init(jax.random.key(0))))


def headed(count=2, **options):
    head = Head((8,))
    network = ValueNetwork(BACKBONE, head, num_values=count, **options)
    heads = head.init(jax.random.key(1), BACKBONE.config.embed_dim, count)
    return network, ValueParams(larger(BACKBONE.init(jax.random.key(2))), heads)


def adapted(count=3):
    network, params = headed(count, adapters=True)
    adapters = init_adapters(BACKBONE.config, jax.random.key(3), copies=count, rank=2)
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return network, ValueParams(params.backbone, params.head, jax.tree.unflatten(structure, moved))


KINDS = {
    "a score head": scoring(),
    "heads of a layer": headed(layer=1),
    "adapters": adapted(),
}


class Prefixes:
    """The value of every sequence, read as a whole."""

    def __init__(self, network, params):
        self.network, self.params = network, params
        self.read = jax.jit(network.forward)

    def __call__(self, sequences):
        length = 16 + SLOTS + LENGTH
        tokens = np.zeros((len(sequences), length), np.int32)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = sequence
        ends = np.array([len(sequence) for sequence in sequences])
        values = self.read(self.params, tokens, np.arange(length) < ends[:, None])
        return np.asarray(values)[np.arange(len(sequences)), ends - 1]


def prompts(rng, number=2):
    """Padded, on both sides."""
    tokens = rng.integers(4, 64, (number, 16)).astype(np.int32)
    mask = np.ones((number, 16), bool)
    mask[0, 11:] = False
    mask[-1, :3] = False
    return tokens, mask


@pytest.mark.parametrize("forgetful", [False, True], ids=["all of a beam", "a part of it"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_whole_prefixes(kind, forgetful):
    rng = np.random.default_rng(0)
    network, params = KINDS[kind]
    whole, recomputed = Prefixes(network, params), RecomputedNetwork(network)
    tokens, mask = prompts(rng)
    values, memory = jax.jit(lambda *a: recomputed.prefill(*a, **SIZES))(params, tokens, mask)
    starts = [list(row[real]) for row, real in zip(tokens, mask, strict=True)]
    np.testing.assert_allclose(values, whole(starts), atol=1e-4, rtol=1e-4)

    extend = jax.jit(recomputed.extend)
    beams = [[list(start) for _ in range(WIDTH)] for start in starts]
    for _ in range(SLOTS // LENGTH):
        lead = (2, WIDTH, SUCCESSORS)
        new = rng.integers(4, 64, (*lead, LENGTH)).astype(np.int32)
        real = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, lead)[..., None]
        left = np.array(
            [
                [len(beam) - len(start) for beam in of]
                for of, start in zip(beams, starts, strict=True)
            ]
        )
        kept = None
        if forgetful:
            kept = rng.integers(left[..., None] // 2, left[..., None] + 1, lead).astype(np.int32)
        values, memory = extend(params, memory, new, real, kept)
        candidates = [
            [
                beams[p][k][: len(starts[p]) + (left[p, k] if kept is None else kept[p, k, b])]
                + list(new[p, k, b][real[p, k, b]])
                for k in range(WIDTH)
                for b in range(SUCCESSORS)
            ]
            for p in range(2)
        ]
        want = whole([*itertools.chain(*candidates)])
        assert np.ptp(want) > 0.1
        np.testing.assert_allclose(values.reshape(want.shape), want, atol=1e-4, rtol=1e-4)
        parents = rng.integers(0, WIDTH * SUCCESSORS, (2, WIDTH)).astype(np.int32)
        memory = memory.commit(jnp.asarray(parents))
        beams = [[candidates[p][c] for c in parents[p]] for p in range(2)]


def test_memory_lets_other_prompts_in():
    network, params = KINDS["adapters"]
    recomputed = RecomputedNetwork(network)
    rng = np.random.default_rng(3)
    tokens, mask = prompts(rng, 3)
    new = rng.integers(4, 64, (3, WIDTH, SUCCESSORS, LENGTH)).astype(np.int32)

    def prefill(rows):
        return recomputed.prefill(params, tokens[rows], mask[rows], **SIZES)[1]

    @jax.jit
    def both():
        admitted = prefill([0, 1]).admit(jnp.array([1]), prefill([2]))
        values, _ = recomputed.extend(params, admitted, new[::2], new[::2] > 0)
        want, _ = recomputed.extend(params, prefill([0, 1, 2]), new, new > 0)
        return values, want[::2]

    values, want = both()
    np.testing.assert_allclose(values, want, atol=1e-5, rtol=1e-5)


def test_memory_holds_no_keys_and_values():
    """Of many prompts, hardly more than of one."""
    network, params = KINDS["adapters"]

    def bytes_of(network, number):
        tokens = np.full((number, 16), 5, np.int32)

        def remembered():
            return network.prefill(params, tokens, tokens > 0, **SIZES)[1]

        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(remembered)))

    config = BACKBONE.config
    of_slot = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4
    assert bytes_of(network, 8) > 24 * of_slot * (16 + WIDTH * SLOTS)
    assert bytes_of(RecomputedNetwork(network), 8) < bytes_of(network, 8) / 24
