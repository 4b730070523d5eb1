"""Measurements of guda_fast against its rivals; from a checkout: ``python -m benchmarks --help``."""
