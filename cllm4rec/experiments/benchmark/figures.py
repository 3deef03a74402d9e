"""A measured figure: the median of several samples and their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_MIN_REPEATS = 3

Figures = dict[str, Any]
"""Figures by name, and under `spread` [minimum, maximum] by name."""


def summarize(samples: Mapping[str, Sequence[float]]) -> Figures:
    """The median of the samples of each name, with their spread."""
    medians: Figures = {name: statistics.median(values) for name, values in samples.items()}
    return medians | {"spread": {name: [min(values), max(values)] for name, values in samples.items()}}


def seconds_of(work: Callable[[], object], repeats: int, warm_up: int = 1) -> list[float]:
    """Wall-clock seconds of each of `repeats` calls, after `warm_up` calls that are not measured."""
    for _ in range(warm_up):
        work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def repeats(most: int, seconds: float, warm_up: int) -> Iterator[bool]:
    """Yields for each repetition whether it counts: `warm_up` that do not count, then up to `most` that do.

    Repetitions end after `seconds`, but at least three count.
    """
    began = time.perf_counter()
    for number in range(warm_up + most):
        if number >= warm_up + _MIN_REPEATS and time.perf_counter() - began > seconds:
            return
        yield number >= warm_up


def ratio(ours: Figures, reference: Figures, name: str) -> float:
    """Our figure divided by that of the reference."""
    return float(ours[name] / reference[name])
