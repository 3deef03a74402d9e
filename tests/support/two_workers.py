"""Processes that form a process group, as training workers do."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch

from cllm4rec.training.shares import Share, Value, whole


def join_workers(rank: int, num_workers: int, port: int) -> None:
    """Make this process worker `rank` of a group on this machine that computes on one core each, on a CPU."""
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(num_workers)}
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=num_workers,
        timeout=datetime.timedelta(seconds=60),
    )


def joined(values: dict[str, Value]) -> dict[str, torch.Tensor]:
    """Whole tensors from the shares of all workers. Every worker must call it."""
    if not any(isinstance(value, Share) for value in values.values()):
        return {name: whole(value) for name, value in values.items()}
    workers: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(workers, values)
    flat = {name: torch.cat([worker[name].values for worker in workers]) for name in values}
    return {name: tensor.view(values[name].shape) for name, tensor in flat.items()}
