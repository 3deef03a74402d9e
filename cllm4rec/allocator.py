"""The memory allocator of processes that train and score: jemalloc, as Ray's wheel for Linux brings it along.

A training step allocates and frees some gigabytes in large pieces. glibc hands most of them back to the system each time
and takes them anew, page by page; jemalloc, told to keep them and to use huge pages, took 1.25 s for a step of 1.50 s
(DECISIONS.md, "Speed"). A process has to be started with it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

_NAMES = ("LD_PRELOAD", "MALLOC_CONF")
_SETTINGS = "thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1"


def environment() -> dict[str, str]:
    """The variables to start such a process with: what somebody has chosen here, else jemalloc where there is one."""
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
    """An environment whose programs use the system's allocator."""
    return {name: value for name, value in variables.items() if name not in _NAMES}
