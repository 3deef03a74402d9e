"""Random numbers without a generator that has a state: each number is a hash of what it is used for.

A number is a function of (seed, epoch, stream, keys) and nothing else. It does not depend on which worker draws it, in which
order, or whether the run was interrupted before.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from cllm4rec.typing import Array, FloatArray


class Stream(IntEnum):
    """One stream of random numbers for each purpose."""

    ORDER = 0
    HOLD_OUT = 1
    FRACTION = 2
    HIDE = 3
    SAMPLE = 4
    SHUFFLE = 5
    DRAW = 6
    COLD = 7


def hash_uniform(seed: int, epoch: int, stream: int, *keys: Array) -> FloatArray:
    """Numbers in [0, 1), one for each entry of the first key, as a hash of all arguments (splitmix64, Steele 2014).

    The other keys have the same length or are single numbers.
    """
    state = _mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) ^ _mix(np.uint64(epoch * 64 + stream)))
    mixed = np.full(np.shape(keys[0]), state, np.uint64)
    for key in keys:
        mixed = _mix(mixed ^ np.asarray(key).astype(np.int64).astype(np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: Any) -> Any:
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
