"""Kernels for NVIDIA GPUs, behind `model.attention` and `model.accelerate`."""
