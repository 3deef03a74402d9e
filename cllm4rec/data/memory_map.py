"""Rows that a process reads as if they were in memory, and that the kernel may keep on disk.

    documents = on_disk(parts)

The files lie in TMPDIR without a name, so they are gone with the process however it ends.
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


def on_disk(parts: Iterable[Rows]) -> Rows:
    """All parts, one after another, as one whose arrays are maps of files. Only one part is in memory at a time.

    Raises ResourceError where TMPDIR is full, ValueError where there is no part.
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
    """An array, or a Ragged's values and offsets."""

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
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - its map outlives it
        self._dtype: Any = None

    def append(self, array: Array) -> None:
        assert self._dtype in (None, array.dtype), "parts differ in type"
        self._dtype = array.dtype
        try:
            self._file.write(np.ascontiguousarray(array).data)
            self._file.flush()
        except OSError as error:
            raise ResourceError(
                f"{tempfile.gettempdir()} cannot take what a worker keeps on disk ({error.strerror}); set TMPDIR to a "
                "folder with more room on every node"
            ) from None

    def mapped(self) -> Array:
        if not self._file.tell():  # nothing cannot be mapped
            return np.empty(0, self._dtype)
        return np.asarray(np.memmap(self._file, self._dtype, mode="r"))
