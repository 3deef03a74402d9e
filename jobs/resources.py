"""Is the cluster large enough for what is about to start? Asked first, because Ray itself would wait for ever."""

from __future__ import annotations

import time
from collections.abc import Mapping

from cllm4rec.errors import ResourceError


def wait_for(needed: Mapping[str, float], timeout_s: float, who: str, remedy: str) -> None:
    """Return when the cluster has `needed` (resource → amount), which may take an autoscaler a while.

    Raises ResourceError after `timeout_s`, naming what was asked and what exists.
    """
    import ray

    deadline = time.monotonic() + timeout_s
    while True:
        existing = ray.cluster_resources()
        if all(existing.get(name, 0.0) >= amount for name, amount in needed.items()):
            return
        if time.monotonic() > deadline:
            asked = " and ".join(f"{amount:g} {name}s" for name, amount in needed.items())
            exists = " and ".join(f"{existing.get(name, 0.0):g} {name}s" for name in needed)
            raise ResourceError(f"{who} asks for {asked} and the cluster has {exists}; {remedy}")
        time.sleep(0.5)
