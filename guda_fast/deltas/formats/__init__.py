"""Readers of model files, one module a format; each gives a ``Weights``."""
