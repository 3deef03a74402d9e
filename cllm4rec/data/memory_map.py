"""Documents and histories whose arrays are memory-mapped files, so that they need not fit in memory.

    documents = memory_mapped(parts)

The files are unnamed files in TMPDIR: the system removes them when the process ends, however it ends.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import Documents
from cllm4rec.errors import ResourceError
from cllm4rec.typing import Array

Rows = TypeVar("Rows", Documents, Histories)


def memory_mapped(parts: Iterable[Rows]) -> Rows:
    """Concatenate all parts into one object with memory-mapped arrays. One part is in memory at a time.

    Raises ResourceError if TMPDIR is full, and ValueError if there is no part.
    """
    columns: dict[str, _Column] = {}
    kind: type[Rows] | None = None
    for part in parts:
        kind = type(part)
        for field in dataclasses.fields(part):
            columns.setdefault(field.name, _Column()).append(getattr(part, field.name))
    if kind is None:
        raise ValueError("there is no part")
    mapped: dict[str, Any] = {name: column.mapped() for name, column in columns.items()}
    return kind(**mapped)


class _Column:
    """One column: the file of an array, or the files of the values and offsets of a Ragged."""

    def __init__(self) -> None:
        self._files: list[_File] = []
        self._end = 0

    def append(self, rows: Array | Ragged) -> None:
        if not self._files:
            self._files = [_File() for _ in range(2 if isinstance(rows, Ragged) else 1)]
            if isinstance(rows, Ragged):
                self._files[1].append(np.zeros(1, np.int64))
        if not isinstance(rows, Ragged):
            self._files[0].append(rows)
            return
        self._files[0].append(rows.values)
        self._files[1].append(rows.offsets[1:] + self._end)
        self._end += len(rows.values)

    def mapped(self) -> Array | Ragged:
        arrays = [file.mapped() for file in self._files]
        return Ragged(*arrays) if len(arrays) == 2 else arrays[0]


class _File:
    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - the memory map outlives it
        self._dtype: Any = None

    def append(self, array: Array) -> None:
        assert self._dtype in (None, array.dtype), "parts differ in type"
        self._dtype = array.dtype
        try:
            self._file.write(np.ascontiguousarray(array).data)
            self._file.flush()
        except OSError as error:
            raise ResourceError(
                f"a worker cannot write its documents to {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a folder with "
                "more space on every node"
            ) from None

    def mapped(self) -> Array:
        if not self._file.tell():  # an empty file cannot be mapped
            return np.empty(0, self._dtype)
        return np.asarray(np.memmap(self._file, self._dtype, mode="r"))
