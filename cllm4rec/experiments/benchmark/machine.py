"""The machine's own rate: the fastest large matrix product in each precision, and memory copy."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch

from cllm4rec.experiments.benchmark.figures import Row, row, seconds_of

SHAPES = ((2048, 2048, 2048), (4096, 4096, 4096), (4096, 768, 3072), (4096, 3072, 768), (4096, 768, 2304))
"""Rows, inner and columns of the products: large squares, and those of GPT-2 small. The fastest speaks for the machine."""
_COPY_BYTES = 1 << 28


def machine(repeats: int = 7, device: str = "cpu") -> Row:
    """`fp32_flops_per_s`, `bf16_flops_per_s` (a multiplication and an addition are 2) and `copy_bytes_per_s` (read and
    written bytes together), with torch's present number of threads."""
    rates = {
        f"{name}_flops_per_s": max((_product_rates(shape, dtype, repeats, device) for shape in SHAPES), key=_median)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copies = seconds_of(_finished(functools.partial(target.copy_, source), device), repeats)
    return row(rates | {"copy_bytes_per_s": [2 * _COPY_BYTES / seconds for seconds in copies]}) | {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability(),
    }


def rate_now(precision: torch.dtype, device: str = "cpu") -> Callable[[], float]:
    """A function that tells the rate of the moment in a precision, FLOP/s: what a share of a sample is taken of.

    A machine that others share is not as fast at the end of a run as at its beginning.
    """
    fastest = max(SHAPES, key=lambda shape: _median(_product_rates(shape, precision, 3, device)))
    return lambda: _median(_product_rates(fastest, precision, 3, device))


def _product_rates(shape: tuple[int, int, int], dtype: torch.dtype, repeats: int, device: str) -> list[float]:
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(inner, columns, device=device).to(dtype)
    seconds = seconds_of(_finished(functools.partial(torch.mm, left, right), device), repeats, warm_up=2)
    return [2.0 * rows * inner * columns / one for one in seconds]


def _finished(work: Callable[[], object], device: str) -> Callable[[], object]:
    """A GPU returns before it is done."""

    def wait() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    return wait


def _median(rates: list[float]) -> float:
    return statistics.median(rates)
