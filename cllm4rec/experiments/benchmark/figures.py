"""A measured number: the median of several and the spread around it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_LEAST_GOES = 3

Row = dict[str, Any]
"""Figures by name, and under `spread` for each of them [least, most]."""


def row(samples: Mapping[str, Sequence[float]]) -> Row:
    """The median of each name's samples, with their spread."""
    medians: Row = {name: statistics.median(values) for name, values in samples.items()}
    return medians | {"spread": {name: [min(values), max(values)] for name, values in samples.items()}}


def seconds_of(work: Callable[[], object], repeats: int, warm_up: int = 1) -> list[float]:
    """Wall-clock seconds of each of `repeats` calls, after `warm_up` that are not counted."""
    for _ in range(warm_up):
        work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def repeats(most: int, seconds: float, warm_up: int) -> Iterator[bool]:
    """Whether each go counts: `warm_up` that do not, then `most` that do, or as many of them as `seconds` allow and at least
    three."""
    began = time.perf_counter()
    for number in range(warm_up + most):
        if number >= warm_up + _LEAST_GOES and time.perf_counter() - began > seconds:
            return
        yield number >= warm_up


def ratio(ours: Row, reference: Row, name: str) -> float:
    """How many times the reference's figure ours is."""
    return float(ours[name] / reference[name])
