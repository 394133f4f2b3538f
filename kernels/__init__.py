"""Pallas kernels with their XLA references.

This package has the same name as Hugging Face's `kernels`, which `transformers` looks for.
It is told apart by having no version, so nothing may be defined or imported here.
"""
