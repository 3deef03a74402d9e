"""Lists of different lengths as two flat arrays: the shape of token lists and histories everywhere in this project.

seen = Ragged.from_lists([[3, 1], [], [2]])
seen.values, seen.offsets         # array([3, 1, 2]), array([0, 2, 2, 3])
seen.take(np.array([2, 0]))       # [[2], [3, 1]]
new = lists.where(~lists.isin(seen))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cllm4rec.typing import Array, BoolArray, IntArray


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Row r is `values[offsets[r] : offsets[r + 1]]`; `offsets` starts with 0 and has one entry more than there are rows."""

    values: Array
    offsets: IntArray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Array:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.offsets)

    @property
    def rows(self) -> IntArray:
        """The row of each value."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def places(self) -> IntArray:
        """The position of each value in its row, counted from 0."""
        return np.arange(len(self.values)) - np.repeat(self.offsets[:-1], self.lengths)

    def take(self, rows: Array) -> Ragged:
        """The rows at these indices, in this order."""
        lengths = self.lengths[rows]
        offsets = offsets_of(lengths)
        starts = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return Ragged(self.values[starts + np.arange(offsets[-1])], offsets)

    def scatter(self, rows: Array, num_rows: int) -> Ragged:
        """The inverse of `take`: row r becomes row `rows[r]` (distinct) of `num_rows`; all other rows are empty."""
        source = np.full(num_rows, len(self))
        source[rows] = np.arange(len(self))
        return Ragged(self.values, np.append(self.offsets, self.offsets[-1])).take(source)

    def where(self, keep: BoolArray) -> Ragged:
        """The same rows with only the values for which `keep` (one flag per value) is true."""
        return Ragged(self.values[keep], offsets_of(np.bincount(self.rows[keep], minlength=len(self))))

    def keys(self, stride: int) -> IntArray:
        """Row and value of each entry as one integer, row * stride + value. Values must be in 0..stride-1."""
        return self.rows * stride + self.values

    def isin(self, other: Ragged) -> BoolArray:
        """For each value, whether the same row of `other` contains it. Values must not be negative."""
        stride = int(max(self.values.max(initial=0), other.values.max(initial=0))) + 1
        return np.isin(self.keys(stride), other.keys(stride))

    def unique(self) -> Ragged:
        """The same rows with each value once, ascending, as int64. Values must not be negative."""
        stride = int(self.values.max(initial=0)) + 1
        distinct = np.unique(self.keys(stride)).astype(np.int64)
        return Ragged.from_rows(distinct % stride, distinct // stride, len(self))

    def tolist(self) -> list[list[Any]]:
        return [self[row].tolist() for row in range(len(self))]

    def to_arrow(self) -> pa.Array:
        return pa.LargeListArray.from_arrays(pa.array(self.offsets, pa.int64()), pa.array(self.values))

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[int] | Array], dtype: Any = np.int64) -> Ragged:
        arrays = [np.asarray(values, dtype=dtype) for values in lists]
        lengths = np.array([len(values) for values in arrays], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, dtype), *arrays]), offsets_of(lengths))

    @classmethod
    def empty(cls, num_rows: int) -> Ragged:
        """Rows without values."""
        return cls(np.empty(0, np.int32), np.zeros(num_rows + 1, np.int64))

    @classmethod
    def from_rows(cls, values: Array, rows: Array, num_rows: int) -> Ragged:
        """From values and the row number of each; `rows` must be ascending."""
        return cls(values, offsets_of(np.bincount(rows, minlength=num_rows)))

    @classmethod
    def from_arrow(cls, column: pa.Array | pa.ChunkedArray) -> Ragged:
        """From a list column, without creating Python objects; missing lists are not allowed."""
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
        """Row r is the concatenation of row r of all parts, in order."""
        num_rows = len(parts[0])
        stacked = cls.concat(parts)
        order = (np.arange(num_rows)[:, None] + num_rows * np.arange(len(parts))[None, :]).ravel()
        taken = stacked.take(order)
        return cls(taken.values, taken.offsets[:: len(parts)])


def offsets_of(lengths: Array) -> IntArray:
    """The offsets of rows with these lengths."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def slices(total: int, size: int) -> Iterator[slice]:
    """0..total-1 as consecutive slices of at most `size`."""
    for begin in range(0, total, size):
        yield slice(begin, min(begin + size, total))


def chunks(total: int, size: int) -> Iterator[IntArray]:
    """0..total-1 as consecutive arrays of at most `size`."""
    for part in slices(total, size):
        yield np.arange(part.start, part.stop)
