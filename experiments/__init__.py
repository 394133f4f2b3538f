"""Command-line entry points; the algorithms live in `iro_jax`."""

import os

# Without PyTorch, which nothing here needs, `transformers` advises to install it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
