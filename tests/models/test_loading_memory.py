"""Loading needs hardly more memory than what is loaded.

A checkpoint of more than 3 GiB in several shards is made on the fly and loaded in a process
of its own. Its peak resident memory, less the bytes loaded, must stay under the largest
tensor plus half a GiB.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

pytestmark = pytest.mark.slow

GIB = 2**30
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 13,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

LOADER = """
import json, sys
import jax
from iro_jax.models import from_pretrained, make_mesh
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))
before = peak()
mesh = make_mesh(1, 2) if sys.argv[2] == "sharded" else None
model = from_pretrained(sys.argv[1], mesh=mesh)
leaves = jax.tree.leaves(model.params)
print(json.dumps({
    "peak": peak(),
    "before": before,
    "loaded": sum(x.nbytes for x in leaves),
    "largest": max(x.nbytes for x in leaves),
}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Writes the checkpoint a layer a shard, never holding more than a shard."""
    from iro_jax.models.families import FAMILIES, translate_config
    from iro_jax.models.weights.layout import checkpoint_layout, tensor_shapes

    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < 5 * GIB:
        pytest.skip("less than 5 GiB of disk are free")
    layout = checkpoint_layout(translate_config(CONFIG), FAMILIES["llama"].names)
    shards: dict[str, list] = {}
    for name, shape in tensor_shapes(layout).items():
        layer = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        shards.setdefault(f"model-{layer}.safetensors", []).append((name, shape))
    weight_map, total = {}, 0
    for shard, tensors in shards.items():
        arrays = {
            name: np.full(shape, (len(weight_map) + i) % 7 * 0.01, np.float32)
            for i, (name, shape) in enumerate(tensors)
        }
        safetensors.numpy.save_file(arrays, folder / shard)
        weight_map |= dict.fromkeys(arrays, shard)
        total += sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert total >= 3 * GIB
    yield folder, total
    shutil.rmtree(folder)


@pytest.mark.parametrize("placement", ["one device", "sharded"])
def test_peak_memory(checkpoint, placement):
    folder, total = checkpoint
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(folder), placement],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["loaded"] == total
    excess = measured["peak"] - measured["loaded"]
    print(
        f"{placement}: loaded {total / GIB:.2f} GiB, peak {measured['peak'] / GIB:.2f},"
        f" excess {excess / GIB:.2f}, before loading {measured['before'] / GIB:.2f},"
        f" largest tensor {measured['largest'] / GIB:.2f}"
    )
    assert excess < measured["largest"] + GIB / 2
