"""Write a version of the published table to one file: Parquet, JSON lines or CSV."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from cllm4rec.errors import ConfigError
from cllm4rec.storage import files
from cllm4rec.storage.table import SCHEMA
from cllm4rec.storage.table_versions import BATCH_USERS, tables
from cllm4rec.storage.tombstones import Tombstones


def export(
    dump_dir: str,
    version: int | None,
    target: str,
    file_format: str,
    tombstones: Tombstones,
    *,
    force: bool = False,
    batch_users: int = BATCH_USERS,
) -> int:
    """Write a version to one file, which appears only when it is complete; returns the number of users in it.

    Erased users are left out. `parquet` has the columns of the table; `jsonl` has one object per user with the same names;
    `csv` has one row per recommended item (user_id, rank from 1, item_id, score), so users with an empty list are not in
    it. Raises ConfigError if `target` exists without `force`, or is a directory; ArtifactError if the version is not
    readable.
    """
    fs, path = files.filesystem(target)
    if fs.isdir(path):
        raise ConfigError(f"{target} is a directory; name a file in it")
    if fs.exists(path) and not force:
        raise ConfigError(f"{target} exists; --force replaces it")
    parts = (_without_erased(table, tombstones) for table in tables(dump_dir, version, batch_users=batch_users))
    draft = f"{path}.{uuid.uuid4().hex[:8]}.partial"
    fs.makedirs(fs._parent(path), exist_ok=True)
    try:
        with fs.open(draft, "wb") as stream:
            num_written = _WRITERS[file_format](stream, parts)
        fs.mv(draft, path)
    finally:
        if fs.exists(draft):
            fs.rm_file(draft)
    return num_written


def _without_erased(table: pa.Table, tombstones: Tombstones) -> pa.Table:
    if not len(tombstones):
        return table
    return table.filter(pa.array(~tombstones.contains(table["user_id"].to_numpy(zero_copy_only=False))))


def _write_parquet(stream: BinaryIO, parts: Iterable[pa.Table]) -> int:
    num_written = 0
    with pq.ParquetWriter(stream, SCHEMA) as writer:
        for table in parts:
            writer.write_table(table)
            num_written += len(table)
    return num_written


def _write_jsonl(stream: BinaryIO, parts: Iterable[pa.Table]) -> int:
    num_written = 0
    for table in parts:
        lines = [json.dumps(row, ensure_ascii=False) for row in table.to_pylist()]
        stream.write("".join(f"{line}\n" for line in lines).encode())
        num_written += len(lines)
    return num_written


def _write_csv(stream: BinaryIO, parts: Iterable[pa.Table]) -> int:
    schema = pa.schema(
        [("user_id", pa.string()), ("rank", pa.int64()), ("item_id", pa.string()), ("score", pa.float32())]
    )
    num_written = 0
    with pyarrow.csv.CSVWriter(stream, schema) as writer:
        for table in parts:
            writer.write_table(_row_per_item(table, schema))
            num_written += len(table)
    return num_written


def _row_per_item(table: pa.Table, schema: pa.Schema) -> pa.Table:
    lengths = pc.list_value_length(table["scores"]).to_numpy()
    row_E = np.repeat(np.arange(len(lengths)), lengths)
    rank_E = np.arange(1, len(row_E) + 1) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return pa.table(
        [
            table["user_id"].take(pa.array(row_E)),
            pa.array(rank_E, pa.int64()),
            pc.list_flatten(table["item_ids"]),
            pc.list_flatten(table["scores"]),
        ],
        schema=schema,
    )


_WRITERS: dict[str, Callable[[BinaryIO, Iterable[pa.Table]], int]] = {
    "parquet": _write_parquet,
    "csv": _write_csv,
    "jsonl": _write_jsonl,
}
FORMATS = tuple(_WRITERS)
