"""Kernels for CPUs, behind `model.attention` and `model.accelerate`."""
