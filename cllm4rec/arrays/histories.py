"""The items of each user, by split."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.typing import Array, IntArray

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Histories:
    """Item indices of each user by split, oldest first; row r belongs to user index `user[r]`."""

    user: IntArray
    train: Ragged
    validation: Ragged
    test: Ragged

    def together(self, *splits: str) -> Ragged:
        """The items of several splits, one row per user."""
        return Ragged.interleave(*(getattr(self, split) for split in splits))

    def take(self, rows: Array) -> Histories:
        return Histories(self.user[rows], self.train.take(rows), self.validation.take(rows), self.test.take(rows))

    @classmethod
    def empty(cls) -> Histories:
        """No users."""
        return cls(np.empty(0, np.int64), Ragged.empty(0), Ragged.empty(0), Ragged.empty(0))

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Histories:
        users = table["user"].to_numpy().astype(np.int64)
        rows = cls(users, *(Ragged.from_arrow(table[split]) for split in SPLITS))
        return rows.take(np.argsort(users, kind="stable"))
