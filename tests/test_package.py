"""The package itself: versions, names, imports."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
CORE = ["jax", "flax", "optax", "orbax-checkpoint", "transformers", "chex", "grain", "gguf"]


def requirements():
    declared = importlib.metadata.requires("iro_jax")
    assert declared, "iro_jax is not installed: pip install -e ."
    parsed = map(Requirement, declared)
    return {r.name: r for r in parsed if r.marker is None}


@pytest.mark.parametrize("name", CORE)
def test_installed_versions_are_within_what_setup_declares(name):
    version = importlib.metadata.version(name)
    assert requirements()[name].specifier.contains(version, prereleases=True), version


def test_jaxlib_belongs_to_jax():
    jax, jaxlib = (importlib.metadata.version(name) for name in ("jax", "jaxlib"))
    assert jax.split(".")[:2] == jaxlib.split(".")[:2]


def test_pinned_set_satisfies_what_setup_declares():
    pinned = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                [exact] = requirement.specifier
                assert exact.operator == "=="
                pinned[requirement.name.replace("_", "-").lower()] = exact.version
    for name, requirement in requirements().items():
        name = name.replace("_", "-").lower()
        assert name in pinned, f"{name} is not pinned in requirements.txt"
        assert requirement.specifier.contains(pinned[name]), name


def test_kernels_is_not_taken_for_hugging_faces_package():
    """`transformers` looks for a package of that name, from wherever Python is started."""
    code = (
        "import sys, transformers\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert not is_kernels_available(), 'taken for the other one'\n"
        "import kernels\n"
        "assert not hasattr(kernels, '__version__')\n"
        "assert not hasattr(kernels, 'get_kernel')\n"
        "from transformers import LlamaConfig, AutoTokenizer\n"
        "try:\n"
        "    import torch\n"
        "except ImportError:\n"
        "    sys.exit()\n"
        "import transformers.integrations.hub_kernels\n"
        "from transformers import LlamaForCausalLM\n"
        "sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2)\n"
        "config = LlamaConfig(vocab_size=9, num_hidden_layers=1, **sizes)\n"
        "LlamaForCausalLM(config)(torch.ones((1, 3), dtype=torch.long))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


ROOMS = {
    "models": {"models"},
    "search": {"search"},
    "data": {"data", "models"},
    "rewards": {"rewards", "data", "models"},
    "values": {"values", "rewards", "data", "models"},
    "evaluation": {"evaluation", "models"},
    "guidance": {"guidance", "search", "values", "models"},
}


def test_imports_point_down():
    """The library knows nothing of experiments or configs, and never reads with torch."""
    for path in (ROOT / "iro_jax").rglob("*.py"):
        for name in imports_of(path):
            top = name.split(".")[0]
            assert top not in ("experiments", "configs", "torch", "pickle"), (path, name)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_those_below(room):
    """The search knows models only through the functions that are handed to it.

    `iro_jax.files` knows none of them, and all may use it.
    """
    for path in (ROOT / "iro_jax" / room).rglob("*.py"):
        for name in imports_of(path):
            if name.startswith("iro_jax."):
                assert name.split(".")[1] in ROOMS[room] | {"files"}, (path, name)


def test_importing_the_library_does_not_import_torch():
    code = "import sys, iro_jax\nassert 'torch' not in sys.modules and 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
