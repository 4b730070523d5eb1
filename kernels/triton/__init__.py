"""Triton kernels and their launchers, one file an op."""
