"""A batch as tensors on a device.

Lengths: R rows × T columns of a grid.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from cllm4rec.data.packing import USER_TABLES, Batch, Grid, Table
from cllm4rec.model.attention import Blocks, blocks_of


@dataclasses.dataclass(frozen=True)
class TensorGrid:
    """`Grid` on a device, but that `reads` of users tables name places in the batch's `penalty_users` in place of rows."""

    segment_RT: Tensor
    position_RT: Tensor
    reads: dict[Table, tuple[Tensor, Tensor]]
    blocks: Blocks
    """Which slots may look at which."""

    def is_token(self) -> Tensor:
        """(R, T) of 0 and 1. A row without any token counts as one long document, so that no softmax is empty."""
        mask = self.segment_RT > 0
        return (mask | ~mask.any(dim=1, keepdim=True)).long()


@dataclasses.dataclass(frozen=True)
class TensorBatch:
    """`Batch` on a device; see there for the meaning of every field."""

    grids: tuple[TensorGrid, ...]
    item_slots: Tensor
    item_target_rows: Tensor
    item_targets: Tensor
    word_slots: Tensor
    word_targets: Tensor
    penalty_users: Tensor
    penalty_user_counts: Tensor
    penalty_items: Tensor
    penalty_item_counts: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device, alone: bool = False) -> TensorBatch:
        """alone: attention gives each document the same bits in any company (`attention.blocks_of`)."""
        flat = {
            field.name: _tensor(getattr(batch, field.name), device)
            for field in dataclasses.fields(cls)
            if field.name != "grids"
        }
        return cls(grids=tuple(_grid(grid, batch.penalty_users, device, alone) for grid in batch.grids), **flat)


def _grid(grid: Grid, users: np.ndarray, device: torch.device, alone: bool) -> TensorGrid:
    reads = {
        table: (_tensor(slots, device), _tensor(np.searchsorted(users, rows) if table in USER_TABLES else rows, device))
        for table, (slots, rows) in grid.reads.items()
    }
    blocks = blocks_of(grid.segment_RT, device, alone)
    return TensorGrid(_tensor(grid.segment_RT, device), _tensor(grid.position_RT, device), reads, blocks)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
