"""The machine's rate: the fastest large matrix product in each precision, and the memory bandwidth."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch

from cllm4rec.experiments.benchmark.figures import Figures, seconds_of, summarize

SHAPES = ((2048, 2048, 2048), (4096, 4096, 4096), (4096, 768, 3072), (4096, 3072, 768), (4096, 768, 2304))
"""(rows, inner dimension, columns) of the products: large squares, and shapes of GPT-2 small. The fastest one counts."""
_COPY_BYTES = 1 << 28


def machine(repeats: int = 7, device: str = "cpu") -> Figures:
    """`fp32_flops_per_s`, `bf16_flops_per_s` (a multiplication and an addition count as 2) and `copy_bytes_per_s` (bytes
    read plus bytes written), with torch's current number of threads."""
    rates = {
        f"{name}_flops_per_s": max((_product_rates(shape, dtype, repeats, device) for shape in SHAPES), key=_median)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copies = seconds_of(_finished(functools.partial(target.copy_, source), device), repeats)
    return summarize(rates | {"copy_bytes_per_s": [2 * _COPY_BYTES / seconds for seconds in copies]}) | {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability(),
    }


def rate_sampler(precision: torch.dtype, device: str = "cpu") -> Callable[[], float]:
    """A function that measures the current matrix-product rate in a precision, FLOP/s. Utilization refers to it.

    The rate is sampled throughout a run, because the speed of a shared machine varies.
    """
    fastest = max(SHAPES, key=lambda shape: _median(_product_rates(shape, precision, 3, device)))
    return lambda: _median(_product_rates(fastest, precision, 3, device))


def _product_rates(shape: tuple[int, int, int], dtype: torch.dtype, repeats: int, device: str) -> list[float]:
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(inner, columns, device=device).to(dtype)
    seconds = seconds_of(_finished(functools.partial(torch.mm, left, right), device), repeats, warm_up=2)
    return [2.0 * rows * inner * columns / duration for duration in seconds]


def _finished(work: Callable[[], object], device: str) -> Callable[[], object]:
    """`work` with synchronization, because calls return before a GPU has finished."""

    def wait() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    return wait


def _median(rates: list[float]) -> float:
    return statistics.median(rates)
