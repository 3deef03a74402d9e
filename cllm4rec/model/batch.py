"""Batches as tensors on a device.

Shapes: R rows × T columns of a grid, M items of a sampled softmax, E item targets.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor

from cllm4rec.model.attention import DocumentLayout
from cllm4rec.model.packing import USER_TABLES, Batch, Grid, Table
from cllm4rec.model.sampling import ItemSample
from cllm4rec.typing import Array

_SAMPLED_STEP = 256


@dataclasses.dataclass(frozen=True)
class TensorGrid:
    """`Grid` on a device. Lookups in user tables hold positions in the batch's `distinct_users` instead of table rows."""

    segment_RT: Tensor
    position_RT: Tensor
    lookups: dict[Table, tuple[Tensor, Tensor]]
    layout: DocumentLayout
    """Which slots attend to which."""

    def is_token(self) -> Tensor:
        """The padding mask, (R, T): 1 for tokens. A row of padding is all ones, so that its softmax is not empty."""
        mask = self.segment_RT > 0
        return (mask | ~mask.any(dim=1, keepdim=True)).long()


@dataclasses.dataclass(frozen=True)
class SampledItems:
    """The items that the softmax of the item head runs over instead of the whole catalog: sampled items and all targets.

    The last item is repeated up to a multiple of `_SAMPLED_STEP`, so that matrix products have few distinct shapes: a CPU
    caches one kernel per shape.
    """

    items_M: Tensor
    bias_M: Tensor
    """-log of an item's sampling probability. -inf for repetitions and for targets that were not sampled: these count only
    in predictions of which they are the target."""
    targets_E: Tensor
    """The batch's `item_targets` as positions in `items_M`."""


@dataclasses.dataclass(frozen=True)
class TensorBatch:
    """`Batch` on a device. `Batch` documents the fields."""

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
    source: Batch
    sampled: SampledItems | None = None

    @functools.cached_property
    def read_items(self) -> tuple[Tensor, Tensor]:
        """`Batch.read_items` as values and offsets."""
        read, device = self.source.read_items, self.item_slots.device
        return _tensor(read.values, device), _tensor(read.offsets, device)


def batch_to_device(
    batch: Batch, device: torch.device, batch_invariant: bool = False, sample: ItemSample | None = None
) -> TensorBatch:
    """Copy a batch to a device.

    batch_invariant: attention gives each document the same bits regardless of the rest of the batch (`DocumentLayout`).
    sample: the items of a sampled softmax. By default the softmax runs over all items.
    """
    flat = {
        field.name: _tensor(getattr(batch, field.name), device)
        for field in dataclasses.fields(TensorBatch)
        if field.name not in ("grids", "source", "sampled")
    }
    return TensorBatch(
        grids=tuple(_grid(grid, batch.distinct_users, device, batch_invariant) for grid in batch.grids),
        source=batch,
        sampled=None if sample is None else _sampled_items(sample, batch.item_targets, device),
        **flat,
    )


def _grid(grid: Grid, users: Array, device: torch.device, batch_invariant: bool) -> TensorGrid:
    lookups = {
        table: (_tensor(slots, device), _tensor(np.searchsorted(users, rows) if table in USER_TABLES else rows, device))
        for table, (slots, rows) in grid.lookups.items()
    }
    layout = DocumentLayout(grid.segment_RT, device, batch_invariant)
    return TensorGrid(_tensor(grid.segment_RT, device), _tensor(grid.position_RT, device), lookups, layout)


def _sampled_items(sample: ItemSample, targets: Array, device: torch.device) -> SampledItems:
    items = np.union1d(sample.items, targets)
    positions = np.searchsorted(items, targets)
    padded = np.pad(items, (0, -len(items) % _SAMPLED_STEP), mode="edge")
    bias = np.full(len(padded), -np.inf, np.float32)
    bias[np.searchsorted(items, sample.items)] = -sample.log_probability
    return SampledItems(*(_tensor(array, device) for array in (padded, bias, positions)))


def _tensor(array: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
