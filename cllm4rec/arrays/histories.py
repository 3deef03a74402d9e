"""What every user has, by split."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cllm4rec.arrays.ragged import Ragged

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Histories:
    """Every user's items by split, oldest first; rows in the order of `user`. Item indices."""

    user: npt.NDArray[np.int64]
    train: Ragged
    validation: Ragged
    test: Ragged

    def together(self, *splits: str) -> Ragged:
        """The items of several splits, a row a user."""
        return Ragged.interleave(*(getattr(self, split) for split in splits))

    def take(self, rows: npt.NDArray[Any]) -> Histories:
        return Histories(self.user[rows], self.train.take(rows), self.validation.take(rows), self.test.take(rows))

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Histories:
        users = table["user"].to_numpy().astype(np.int64)
        rows = cls(users, *(Ragged.from_arrow(table[split]) for split in SPLITS))
        return rows.take(np.argsort(users, kind="stable"))
