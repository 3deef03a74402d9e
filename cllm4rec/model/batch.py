"""A batch as tensors on a device.

Lengths: R rows × T columns of a grid.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from cllm4rec.model.attention import DocumentLayout
from cllm4rec.model.packing import USER_TABLES, Batch, Grid, Table
from cllm4rec.model.sampling import ItemSample

_SAMPLED_STEP = 256


@dataclasses.dataclass(frozen=True)
class TensorGrid:
    """`Grid` on a device, but that `lookups` of users tables name places in the batch's `distinct_users` in place of rows."""

    segment_RT: Tensor
    position_RT: Tensor
    lookups: dict[Table, tuple[Tensor, Tensor]]
    layout: DocumentLayout
    """Which slots may look at which."""

    def is_token(self) -> Tensor:
        """(R, T) of 0 and 1. A row without any token counts as one long document, so that no softmax is empty."""
        mask = self.segment_RT > 0
        return (mask | ~mask.any(dim=1, keepdim=True)).long()


@dataclasses.dataclass(frozen=True)
class SampledItems:
    """What the item head's softmax runs over in place of the whole catalog: M items, those drawn and all targets.

    The last is repeated up to a multiple of `_SAMPLED_STEP`, so that products have few shapes: a CPU keeps a kernel for each.
    """

    items_M: Tensor
    bias_M: Tensor
    """-log of the chance to be drawn; -inf for what nobody counts but predictions of it: targets not drawn, repetitions."""
    targets_E: Tensor
    """The batch's `item_targets` as places in `items_M`."""


@dataclasses.dataclass(frozen=True)
class TensorBatch:
    """`Batch` on a device; see there for the meaning of every field."""

    grids: tuple[TensorGrid, ...]
    item_slots: Tensor
    item_target_rows: Tensor
    item_targets: Tensor
    word_slots: Tensor
    word_targets: Tensor
    distinct_users: Tensor
    distinct_user_counts: Tensor
    distinct_items: Tensor
    distinct_item_counts: Tensor
    sampled: SampledItems | None = None


def batch_to_device(
    batch: Batch, device: torch.device, batch_invariant: bool = False, sample: ItemSample | None = None
) -> TensorBatch:
    """batch_invariant: attention gives each document the same bits whatever else is in the batch (`DocumentLayout`).

    sample: the items to predict among, by default all.
    """
    flat = {
        field.name: _tensor(getattr(batch, field.name), device)
        for field in dataclasses.fields(TensorBatch)
        if field.name not in ("grids", "sampled")
    }
    return TensorBatch(
        grids=tuple(_grid(grid, batch.distinct_users, device, batch_invariant) for grid in batch.grids),
        sampled=None if sample is None else _sampled(sample, batch.item_targets, device),
        **flat,
    )


def _grid(grid: Grid, users: np.ndarray, device: torch.device, batch_invariant: bool) -> TensorGrid:
    reads = {
        table: (_tensor(slots, device), _tensor(np.searchsorted(users, rows) if table in USER_TABLES else rows, device))
        for table, (slots, rows) in grid.lookups.items()
    }
    layout = DocumentLayout(grid.segment_RT, device, batch_invariant)
    return TensorGrid(_tensor(grid.segment_RT, device), _tensor(grid.position_RT, device), reads, layout)


def _sampled(sample: ItemSample, targets: np.ndarray, device: torch.device) -> SampledItems:
    items = np.union1d(sample.items, targets)
    places = np.searchsorted(items, targets)
    filled = np.pad(items, (0, -len(items) % _SAMPLED_STEP), mode="edge")
    bias = np.full(len(filled), -np.inf, np.float32)
    bias[np.searchsorted(items, sample.items)] = -sample.log_chance
    return SampledItems(*(_tensor(array, device) for array in (filled, bias, places)))


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
