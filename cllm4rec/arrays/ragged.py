"""Lists of different lengths as two flat arrays: the shape of token lists and histories everywhere in this project."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Row r is `values[offsets[r] : offsets[r + 1]]`; `offsets` starts with 0 and has one entry more than there are rows."""

    values: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """For every value, the row it belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """For every value, its place in its row, from 0."""
        return np.arange(len(self.values)) - np.repeat(self.offsets[:-1], self.lengths)

    def take(self, rows: npt.NDArray[Any]) -> Ragged:
        """The rows at these indices, in this order."""
        lengths = self.lengths[rows]
        offsets = offsets_of(lengths)
        starts = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return Ragged(self.values[starts + np.arange(offsets[-1])], offsets)

    def where(self, keep: npt.NDArray[np.bool_]) -> Ragged:
        """The same rows with only the values for which `keep` (one flag a value) is true."""
        return Ragged(self.values[keep], offsets_of(np.bincount(self.rows[keep], minlength=len(self))))

    def tolist(self) -> list[list[Any]]:
        return [self[row].tolist() for row in range(len(self))]

    def to_arrow(self) -> pa.Array:
        return pa.LargeListArray.from_arrays(pa.array(self.offsets, pa.int64()), pa.array(self.values))

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[int] | npt.NDArray[Any]], dtype: Any = np.int64) -> Ragged:
        arrays = [np.asarray(values, dtype=dtype) for values in lists]
        lengths = np.array([len(values) for values in arrays], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, dtype), *arrays]), offsets_of(lengths))

    @classmethod
    def from_rows(cls, values: npt.NDArray[Any], rows: npt.NDArray[Any], num_rows: int) -> Ragged:
        """From one value and its row number a time, `rows` ascending."""
        return cls(values, offsets_of(np.bincount(rows, minlength=num_rows)))

    @classmethod
    def from_arrow(cls, column: pa.Array | pa.ChunkedArray) -> Ragged:
        """From a list column without a Python object a row; missing lists are not allowed."""
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if isinstance(array, pa.ChunkedArray):  # an empty chunked array combines to itself
            array = pa.array([], column.type)
        offsets = np.asarray(array.offsets, dtype=np.int64)
        values = np.asarray(array.values)[offsets[0] : offsets[-1]]
        return cls(values, offsets - offsets[0])

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        return cls(
            np.concatenate([part.values for part in parts]),
            offsets_of(np.concatenate([part.lengths for part in parts])),
        )

    @classmethod
    def interleave(cls, *parts: Ragged) -> Ragged:
        """Row r is the concatenation of row r of every part, in order."""
        num_rows = len(parts[0])
        stacked = cls.concat(parts)
        order = (np.arange(num_rows)[:, None] + num_rows * np.arange(len(parts))[None, :]).ravel()
        taken = stacked.take(order)
        return cls(taken.values, taken.offsets[:: len(parts)])


def offsets_of(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def no_values(num_rows: int) -> Ragged:
    """Empty rows."""
    return Ragged(np.empty(0, np.int32), np.zeros(num_rows + 1, np.int64))
