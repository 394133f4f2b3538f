"""Command-line entry points; the algorithms live in `iro_jax`."""
