"""Align a frozen language model at test time: value-guided search, in JAX."""

__version__ = "0.1.0"
