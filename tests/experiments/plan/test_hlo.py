# ruff: noqa: E501
"""Collectives are read from HLO: small texts, and programs of eight CPU devices."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.plan.hlo import Collective, collectives, shape_bytes
from iro_jax.models.sharding import make_mesh

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, f32[] %b)
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {
  %p = f32[64]{0:T(128)} parameter(0)
  %all-reduce.9 = f32[64]{0:T(128)} all-reduce(%p), replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %slice = f32[16]{0} dynamic-slice(%all-reduce.9, %p), dynamic_slice_sizes={16}
}

%inner (s: (f32[8])) -> (f32[8]) {
  %s = (f32[8]) parameter(0)
  ROOT %x = (f32[8]) all-reduce(%s), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%outer (s: (f32[8])) -> (f32[8]) {
  %s.1 = (f32[8]) parameter(0)
  %loop.1 = (f32[8]{0:T(8)S(1)}) while(%s.1), body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %g = (bf16[8,2]{1,0:T(2,128)(2,1)}, bf16[8,8]{1,0}) all-gather-start(%s.1), replica_groups=[4,4]<=[4,4]T(1,0), dimensions={1}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %loop = (f32[8]) while(%x.1), condition=%c, body=%outer
  %fused = f32[16]{0} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.1
  %alone = f32[8]{0} all-reduce(%x.1), replica_groups=[16,1]<=[16], to_apply=%add
  ROOT %m = f32[8,8]{1,0} all-to-all(%x.1), replica_groups=mesh['a'=4,'b'=4] {'a'}, dimensions={0}
}
"""


def test_every_collective_of_a_text_is_found_with_its_loops():
    inner, gather, scatter, exchange = collectives(TEXT)
    assert (inner.kind, inner.size, inner.group) == ("all-reduce", 32, (0, 1))
    assert inner.loops == ("outer", "inner")
    assert inner.turns is None  # those of the outer loop are not known
    assert (gather.kind, gather.size, gather.shape) == ("all-gather", 128, "bf16[8,8]")
    assert (gather.group, gather.loops) == ((0, 4, 8, 12), ("outer",))
    assert (scatter.kind, scatter.size, scatter.turns) == ("reduce-scatter", 64, 1)
    assert (exchange.kind, exchange.group) == ("all-to-all", (0, 4, 8, 12))


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 2 * 3 / 4 * 80),
        ("all-gather", 3 / 4 * 80),
        ("reduce-scatter", 3 * 80),
        ("all-to-all", 3 / 4 * 80),
        ("collective-permute", 80),
    ],
)
def test_what_a_ring_of_four_sends(kind, sent):
    assert Collective(kind, "x", "f32[20]", 80, (0, 1, 2, 3)).sent == sent


def test_bytes_of_shapes():
    assert shape_bytes("(f8e4m3fn[16], s4[4], pred[3], bf16[2,0], f32[])") == [16, 2, 3, 0, 4]


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{3,1},{0,2}}", (3, 1)),
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", (0, 4)),
        ("source_target_pairs={{1,2},{2,3}}", (1, 2)),
    ],
)
def test_groups_in_all_of_their_notations(groups, first):
    text = f"""HloModule x, num_partitions=8

ENTRY %main (x: f32[8]) -> f32[8] {{
  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add
}}
"""
    [found] = collectives(text)
    assert found.group == first


def test_groups_in_another_notation_are_an_error():
    text = "ENTRY %m (x: f32[8]) -> f32[8] {\n  ROOT %r = f32[8]{0} all-reduce(%x), groups=?\n}\n"
    with pytest.raises(ValueError, match="not known"):
        collectives(text)


def on_mesh(function, *arrays):
    """Compiled text; arrays are `(shape, *names of mesh axes)`."""
    mesh = make_mesh(2, 2, fsdp=2)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))
        for shape, *axes in arrays
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile().as_text(), dict(mesh.shape)


def test_a_split_product_is_summed_over_its_axis():
    text, mesh = on_mesh(lambda x, w: x @ w, ((8, 16), "data", "model"), ((16, 32), "model"))
    [found] = collectives(text)
    assert (found.kind, found.size, found.axes(mesh)) == ("all-reduce", 4 * 32 * 4, ("model",))
    assert found.sent == found.size  # twice a half


def test_turns_of_a_loop_multiply():
    def function(x, w):
        return lax.fori_loop(0, 7, lambda _, x: lax.fori_loop(0, 3, lambda _, x: x @ w, x), x)

    text, _ = on_mesh(function, ((8, 16), "data", "model"), ((16, 16), "model", None))
    inside = [found for found in collectives(text) if len(found.loops) == 2]
    assert inside
    assert {found.turns for found in inside} == {21}


def test_a_gathered_weight_is_seen():
    def function(w):
        return jnp.sort(lax.with_sharding_constraint(w, P(None, None)), axis=1)

    text, mesh = on_mesh(function, ((16, 32), "fsdp", "model"))
    gathers = [found for found in collectives(text) if found.kind == "all-gather"]
    assert max(found.size for found in gathers) == 16 * 32 * 4
    assert {axis for found in gathers for axis in found.axes(mesh)} == {"fsdp", "model"}
