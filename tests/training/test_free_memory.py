"""Free memory within the limits of a container, read from a file system of made-up control groups."""

from pathlib import Path

import psutil
import pytest
import torch

from cllm4rec.training.free_memory import free_memory, rooms_in_cgroups

V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def write_group(folder: Path, names: tuple[str, str, str], limit: str, usage: int, droppable: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(names, (limit, usage, f"anon 1\n{names[2]} {droppable}"), strict=True):
        (folder / (name if name.startswith("memory.") else "memory.stat")).write_text(f"{content}\n")


def system(root: Path, line: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line)
    return root


def test_the_limits_of_a_group_and_of_those_around_it_count(tmp_path):
    mount = tmp_path / "sys/fs/cgroup"
    write_group(mount / "pod", V2, "1000", 700, 100)
    write_group(mount / "pod/worker", V2, "900", 300, 0)
    write_group(mount / "pod/worker/process", V2, "max", 10, 0)
    write_group(mount / "other", V2, "1", 1, 0)
    assert list(rooms_in_cgroups(system(tmp_path, "0::/pod/worker/process\n"))) == [600, 400]


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    write_group(tmp_path / "sys/fs/cgroup/memory", V1, "5000", 6000, 500)
    lines = "9:cpu:/pods/x\n4:memory,hugetlb:/pods/x\n0::/pods/x\n"
    assert list(rooms_in_cgroups(system(tmp_path, lines))) == [0], "more is used than the limit allows"


def test_without_control_groups_nothing_is_limited(tmp_path):
    assert not list(rooms_in_cgroups(tmp_path))


def test_workers_of_a_machine_share_its_memory():
    whole = psutil.virtual_memory().available
    assert free_memory(torch.device("cpu"), num_sharing=4) == pytest.approx(
        free_memory(torch.device("cpu")) / 4, rel=0.2
    )
    assert 0 < free_memory(torch.device("cpu")) < 1.2 * whole
