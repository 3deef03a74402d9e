"""The memory allocator of training and scoring processes: jemalloc, which Ray's wheel for Linux includes.

A training step allocates and frees several gigabytes in large blocks. glibc returns most of them to the system and requests
them again page by page. jemalloc, configured to keep them and to use huge pages, reduced a step from 1.50 s to 1.25 s
(docs/decisions.md, "Speed"). The allocator must be set before a process starts.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

_NAMES = ("LD_PRELOAD", "MALLOC_CONF")
_SETTINGS = "thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1"


def environment() -> dict[str, str]:
    """Environment variables that select the allocator: those already set here, otherwise jemalloc if Ray includes it."""
    chosen = {name: os.environ[name] for name in _NAMES if name in os.environ}
    if chosen:
        return chosen
    ray = importlib.util.find_spec("ray")
    for folder in (ray and ray.submodule_search_locations) or ():
        library = Path(folder) / "core" / "libjemalloc.so"
        if library.exists():
            return dict(zip(_NAMES, (str(library), _SETTINGS), strict=True))
    return {}


def without(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables without those that select an allocator."""
    return {name: value for name, value in variables.items() if name not in _NAMES}
