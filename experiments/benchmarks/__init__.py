"""Measurements, each a script that carries its peers."""
