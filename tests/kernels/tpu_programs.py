"""Compiles the kernels for TPUs that need not be there, and prints what came out as JSON.

Run as a program, since libtpu takes its settings from the environment:

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m tests.kernels.tpu_programs
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import Part, fused_draw, prefix_attention

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}

# P, K, B, kv_heads, G, D, S, T, L, dtype.
ATTENTION = {
    "Llama-3 8B": (2, 4, 4, 8, 4, 128, 1024, 2048, 16, "bfloat16"),
    "one head a device": (2, 4, 4, 1, 4, 128, 1024, 2048, 16, "bfloat16"),
    "odd sizes": (1, 3, 2, 3, 3, 64, 77, 1300, 5, "float32"),
    "many rows": (1, 8, 8, 8, 8, 128, 1024, 640, 64, "bfloat16"),
    "one candidate": (1, 1, 1, 4, 1, 256, 500, 0, 8, "bfloat16"),
}

# R, V, top_k, top_p, devices.
DRAWS = {
    "Llama-3": (32, 128256, 50, 0.9, 1),
    "Llama-3, top-p": (32, 128256, None, 0.9, 1),
    "Gemma": (5, 262144, 50, 0.9, 1),
    "odd size": (32, 61, None, 1.0, 1),
    "Llama-3, four shards": (32, 128256, 50, 0.9, 4),
}


def mesh_of(topology: str, devices: int) -> Mesh:
    found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[topology])
    return Mesh(np.array(found.devices[:devices]), ("model",))


def attention_arguments(mesh, P_, K, B, kv_heads, G, D, S, T, L, dtype):
    sharding = None if mesh is None else NamedSharding(mesh, P())

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def part(lead, slots):
        keys = array((*lead, kv_heads, slots, D), dtype)
        return Part(keys, keys, array((*lead, slots), jnp.int32))

    lead = (P_, K, B)
    return (
        array((*lead, kv_heads, G, D), dtype),
        array(lead, jnp.int32),
        part(lead[:1], S),
        part(lead[:2], T),
        part(lead, L),
        array((), jnp.int32),
    )


def draw_program(mesh, rows, vocabulary, top_k, top_p, devices):
    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    options = {"temperature": 0.6, "top_k": top_k, "top_p": top_p}
    keys = array((rows, 2), jnp.uint32)
    if devices == 1:
        return functools.partial(fused_draw, **options), (
            keys,
            array((rows, vocabulary), "float32"),
        )
    spec = P(None, "model")
    sharded = jax.shard_map(
        functools.partial(fused_draw, axis_name="model", **options),
        mesh=mesh,
        in_specs=(P(), spec),
        out_specs=P(),
    )
    return sharded, (keys, array((rows, vocabulary), "float32", *spec))


def compiled(mesh, fn, arguments):
    """Facts of the optimised program. Mosaic must know the chip: hence the mesh."""
    with jax.set_mesh(mesh):
        program = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    text, memory = program.as_text(), program.memory_analysis()
    return {
        "kernels": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        "all_reduces": len(re.findall(r" all-reduce(?:-start)?\(", text)),
        "all_gathers": len(re.findall(r" all-gather(?:-start)?\(", text)),
        "outside_bytes": program.cost_analysis()["bytes accessed"],
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def main():
    found = {}
    for topology in TOPOLOGIES:
        for name, sizes in ATTENTION.items():
            mesh = mesh_of(topology, 1)
            fn = functools.partial(prefix_attention, window=900, softcap=30.0)
            arguments = attention_arguments(mesh, *sizes)
            found[f"{topology} attention {name}"] = compiled(mesh, fn, arguments)
        for name, sizes in DRAWS.items():
            mesh = mesh_of(topology, sizes[-1])
            found[f"{topology} draw {name}"] = compiled(mesh, *draw_program(mesh, *sizes))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
