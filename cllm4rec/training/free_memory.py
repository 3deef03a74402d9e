"""The memory that a process may still take: of its GPU, or of its machine within the limits of its container.

    free_memory(device, num_sharing=2)      bytes for one of two workers that load a model at the same time

Linux alone has control groups (cgroups); elsewhere the machine itself is the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch


def free_memory(device: torch.device, num_sharing: int = 1) -> int:
    """Bytes that a process can take on a device.

    num_sharing: the number of processes that share the memory of this machine and load at the same time. Each has a GPU of
        its own.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available: int = psutil.virtual_memory().available
    return min([available, *rooms_in_cgroups()]) // num_sharing


def rooms_in_cgroups(system: Path = Path("/")) -> Iterator[int]:
    """The bytes that each control group with a limit leaves to this process: its own group and those around it.

    File pages that the kernel can drop do not count as used. system: the root of the file system.
    """
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files = ("memory.max", "memory.current", "inactive_file")
            yield from _rooms(system / "sys/fs/cgroup", path, files)
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _rooms(system / "sys/fs/cgroup/memory", path, files)


def _rooms(mount: Path, path: str, files: tuple[str, str, str]) -> Iterator[int]:
    """path: of the group below `mount`. A container may see its own group as the root, so missing folders are skipped."""
    limit_file, usage_file, droppable = files
    group = mount / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(mount):
            return
        try:
            limit = (folder / limit_file).read_text().strip()
            usage = int((folder / usage_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            yield max(0, int(limit) - usage + int(stat.get(droppable, 0)))
