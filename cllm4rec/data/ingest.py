"""The first pass of prepare: read and validate every raw file, and write the texts to staging files.

A file is read by one task and its records are validated by many. Texts stay in the staging files. This process receives
integers, the reasons of refused rows, and each distinct id once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cllm4rec.data.formats import Layout
from cllm4rec.data.ray_data import Batch, Executor, Task
from cllm4rec.data.records import Limits, parse_records, read_records
from cllm4rec.errors import DataError
from cllm4rec.storage.files import join, write_table
from cllm4rec.typing import Array

_REFUSED = pa.schema([("source", pa.int8()), ("file", pa.int32()), ("line", pa.int64()), ("reason", pa.string())])
_TYPES: dict[str, Any] = {"rating": np.float64, "time": np.int64}
"""Types of the columns of `Rows` that are not int32."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """The valid rows of one source, ordered by file and line. `user` and `item` index the ids of `Ingested`; -1 is none."""

    user: Array
    item: Array
    rating: Array
    time: Array
    text_file: Array
    text_row: Array
    """The text of a row is row `text_row` of the staging file `Ingested.text_files[text_file]`."""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: Array) -> Rows:
        return Rows(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Ingested:
    """The result of the first pass: the valid rows of each source, in the order of the layouts, and the refused rows."""

    rows: list[Rows]
    user_ids: Array
    item_ids: Array
    text_files: list[str]
    refused: pa.Table
    """source, file, line and reason, sorted; never the text."""
    rows_in: list[int]
    """How many rows each source has, refused ones included."""


class IdEncoder(dict[str, int]):
    """Strings → numbers, in order of first appearance; a missing string is -1."""

    def __missing__(self, value: str) -> int:
        self[value] = len(self)
        return self[value]

    def encode(self, column: pa.ChunkedArray) -> Array:
        encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
        codes = [-1 if value is None else self[value] for value in encoded.dictionary.to_pylist()]
        coded: Array = np.asarray(codes, np.int32)[np.asarray(encoded.indices)]
        return coded

    def strings(self) -> Array:
        return np.array(list(self), object)


def ingest(layouts: Sequence[Layout], limits: Limits, staging: str, executor: Executor) -> Ingested:
    """Read and validate every file of every source. `staging` is a folder that all tasks can reach.

    Raises DataError for a file that does not match its layout. A row that is wrong is refused and raises nothing.
    """
    task = functools.partial(_validate_block, layouts=layouts, limits=limits, staging=staging)
    return _collect(map_records(layouts, limits, task, executor), layouts)


def map_records(layouts: Sequence[Layout], limits: Limits, task: Task, executor: Executor) -> Iterator[pa.Table]:
    """Apply `task` to blocks of the records of all files (schema RECORDS).

    Two columns are added: `source` is an index into `layouts`, `file` an index into the files of that layout.
    """
    files = [
        {"source": source, "number": number, "file": file}
        for source, layout in enumerate(layouts)
        for number, file in enumerate(layout.files)
    ]
    return executor.map_files(files, functools.partial(_read_files, layouts=layouts, limits=limits), task)


def _read_files(batch: Batch, layouts: Sequence[Layout], limits: Limits) -> Iterator[pa.Table]:
    """Task: the records of one file."""
    for source, number, file in zip(batch["source"], batch["number"], batch["file"], strict=True):
        for records in read_records(str(file), layouts[source], limits):
            yield records.append_column("source", _constant(source, len(records), pa.int8())).append_column(
                "file", _constant(number, len(records), pa.int32())
            )


def _validate_block(records: pa.Table, layouts: Sequence[Layout], limits: Limits, staging: str) -> Iterator[pa.Table]:
    """Task: validate records, write their texts to a staging file, and return the other columns."""
    for part in by_column(by_column([records], "source"), "file"):
        source, number, line = (part[name][0].as_py() for name in ("source", "file", "line"))
        rows = parse_records(part, layouts[source], limits)
        # Named after its first record, so that a task that runs again writes the same file again.
        text_file = f"source-{source}-file-{number:06d}-line-{line:012d}.parquet"
        if layouts[source].text_columns:
            write_table(rows.select(["text"]), join(staging, text_file))
        columns = {name: rows[name] for name in ("line", "user", "item", "rating", "time", "reason")}
        columns["source"] = _constant(source, len(rows), pa.int8())
        columns["file"] = _constant(number, len(rows), pa.int32())
        columns["text_file"] = _constant(text_file, len(rows), pa.string())
        columns["text_row"] = pa.array(np.arange(len(rows)), pa.int32())
        yield pa.table(columns)


def by_column(tables: Iterable[pa.Table], name: str) -> Iterator[pa.Table]:
    """The rows of each table, grouped by the value of an integer column, in ascending order of the values."""
    for table in tables:
        values = table[name].to_numpy()
        order = np.argsort(values, kind="stable")
        bounds = np.flatnonzero(np.diff(values[order], prepend=-1, append=-1)).tolist() if len(values) else [0]
        for low, high in itertools.pairwise(bounds):
            yield table.take(order[low:high])


def _constant(value: Any, num_rows: int, kind: Any) -> Any:
    return pa.repeat(pa.scalar(value, kind), num_rows)


def _collect(blocks: Iterable[pa.Table], layouts: Sequence[Layout]) -> Ingested:
    users, items, text_files = IdEncoder(), IdEncoder(), IdEncoder()
    valid: list[list[_Stretch]] = [[] for _ in layouts]
    refused: list[pa.Table] = [_REFUSED.empty_table()]
    rows_in = [0] * len(layouts)
    for block in by_column(blocks, "source"):
        source = block["source"][0].as_py()
        rows_in[source] += len(block)
        refused.append(block.filter(pc.is_valid(block["reason"])).select(_REFUSED.names))
        for kept in by_column([block.filter(pc.is_null(block["reason"]))], "file"):
            columns = {name: kept[name].to_numpy() for name in ("rating", "time", "text_row")}
            columns |= {"user": users.encode(kept["user"]), "item": items.encode(kept["item"])}
            columns |= {"text_file": text_files.encode(kept["text_file"])}
            valid[source].append(_Stretch.of(kept["file"][0].as_py(), kept["line"].to_numpy(), columns))
    rows = [_joined(stretches) for stretches in valid]
    refused_rows = _with_names(pa.concat_tables(refused), layouts)
    assert sum(rows_in) == sum(map(len, rows)) + len(refused_rows), "a row was lost between reading and collecting"
    return Ingested(rows, users.strings(), items.strings(), list(text_files), refused_rows, rows_in)


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """Valid rows of consecutive lines of one file, as columns of `Rows`. `first` and `last` are (file, line)."""

    first: tuple[int, int]
    last: tuple[int, int]
    columns: dict[str, Array]

    @classmethod
    def of(cls, file: int, line: Array, columns: dict[str, Array]) -> _Stretch:
        order = np.argsort(line)
        typed = {name: column[order].astype(_TYPES.get(name, np.int32)) for name, column in columns.items()}
        return cls((file, int(line[order[0]])), (file, int(line[order[-1]])), typed)


def _joined(stretches: list[_Stretch]) -> Rows:
    """The rows of one source by file and line, whichever task finished first. Empties the stretches, to save memory."""
    stretches = sorted(stretches, key=lambda stretch: stretch.first)
    for earlier, later in itertools.pairwise(stretches):
        assert earlier.last < later.first, "two tasks had overlapping lines"
    joined = {}
    for field in dataclasses.fields(Rows):
        parts = [stretch.columns.pop(field.name) for stretch in stretches]
        joined[field.name] = np.concatenate([np.empty(0, _TYPES.get(field.name, np.int32)), *parts])
    return Rows(**joined)


def _with_names(refused: pa.Table, layouts: Sequence[Layout]) -> pa.Table:
    """Refused rows, sorted, with the names of sources and files in place of their numbers."""
    refused = refused.sort_by([(name, "ascending") for name in ("source", "file", "line")])
    labels = [layout.file_labels for layout in layouts]
    numbers = zip(refused["source"].to_pylist(), refused["file"].to_pylist(), strict=True)
    files = [labels[source][file] for source, file in numbers]
    roles = [layouts[source].role for source in refused["source"].to_pylist()]
    return pa.table(
        [pa.array(roles, pa.string()), pa.array(files, pa.string()), refused["line"], refused["reason"]],
        names=["source", "file", "line", "reason"],
    )


def check_refused(refused: pa.Table, layout: Layout, rows_in: int, most: float) -> None:
    """Raise DataError if a larger share of the rows of a source was refused than `most` (`data.max_bad_fraction`)."""
    number = pc.sum(pc.equal(refused["source"], layout.role)).as_py() or 0
    if number > most * rows_in:
        raise DataError(
            f"{number:,} of {rows_in:,} rows of data.{layout.role} were refused, more than data.max_bad_fraction "
            f"{most} allows: {common_reasons(refused, layout)}; correct the files or the config"
        )


def common_reasons(refused: pa.Table, layout: Layout, most: int = 3) -> str:
    """The most common reasons, how often each occurs, and the first line of each."""
    mine = refused.filter(pc.equal(refused["source"], layout.role))
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(mine["reason"]).to_pylist()}
    sentences = []
    for reason in sorted(counts, key=lambda reason: (-counts[reason], reason))[:most]:
        first = mine.slice(pc.index(mine["reason"], reason).as_py(), 1).to_pylist()[0]
        sentences.append(f"{reason} ({counts[reason]:,} times, first in {first['file']} line {first['line']})")
    return ", ".join(sentences)
