"""What can be done with the published table: list its versions, restore one, hand one on, look a user up, clean up.

Readers are never disturbed: what is published stays as it is, and a restored version is a new one with the old content.
Nothing here loads the table whole, and nothing here writes a user id into the table's log. Whoever changes the table
(`restore`, `vacuum`) holds its lease meanwhile (`cllm4rec.storage.lease`), so that no run is staging.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from fsspec.implementations.local import LocalFileSystem

from cllm4rec.errors import ArtifactError, ConfigError, DataError, ResourceError
from cllm4rec.storage import files
from cllm4rec.storage.table import SCHEMA, delta_files, open_current
from cllm4rec.storage.tombstones import Tombstones

_BATCH_USERS = 16_384
_COMMIT = re.compile(r"\d{20}\.json")
_FACTS = ("run_id", "run_date", "model_version", "schema_version")
# Commits that leave the lists as they are.
_NO_LISTS = ("CREATE TABLE", "VACUUM START", "VACUUM END")


@dataclasses.dataclass(frozen=True)
class Version:
    """A version in which the lists changed. `num_users` is None where its files are gone and it can be read no more."""

    version: int
    time: str
    operation: str
    facts: dict[str, str]
    num_users: int | None


@dataclasses.dataclass(frozen=True)
class Vacuumed:
    """Files that were removed (or would be), and the versions that can be read no more because of that."""

    num_files: int
    num_bytes: int
    versions: list[int]


def versions(dump_dir: str) -> list[Version]:
    """Oldest first, as far back as the log goes. Raises ArtifactError where there is no table."""
    open_table(dump_dir)
    on_disk, counted = set(files.list_files(dump_dir)), dict[str, int]()
    return [
        Version(
            version,
            datetime.fromtimestamp(commit["timestamp"] / 1000, UTC).isoformat(timespec="seconds"),
            commit["operation"],
            {name: commit[name] for name in _FACTS if name in commit},
            _num_users(dump_dir, _files_of(dump_dir, version), on_disk, counted),
        )
        for version, commit in _commits(dump_dir)
        if commit["operation"] not in _NO_LISTS
    ]


def open_table(dump_dir: str, version: int | None = None) -> DeltaTable:
    """The table as it is, or as it was at a version. Raises ArtifactError where there is none, or no such version."""
    table = open_current(dump_dir) if version is None else _open_version(dump_dir, version)
    if table is None:
        raise ArtifactError(f"{dump_dir} is no table yet; publish one with cllm4rec nightly or cllm4rec score")
    return table


def _open_version(dump_dir: str, version: int) -> DeltaTable | None:
    try:
        return DeltaTable(files.absolute(dump_dir), version=version)
    except TableNotFoundError:
        return None
    except (DeltaError, OverflowError):
        raise ArtifactError(
            f"{dump_dir} has no version {version}; `cllm4rec dump --config FILE versions` lists those it has"
        ) from None


def tables(dump_dir: str, version: int | None = None, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a version, some thousand at a time. Raises ArtifactError where its files are gone."""
    names = list(columns) if columns is not None else SCHEMA.names
    schema = pa.schema([SCHEMA.field(name) for name in names])
    dataset = _readable(dump_dir, version).to_pyarrow_dataset()
    # Small batches and little read ahead: Arrow's own choice holds gigabytes of lists.
    for batch in dataset.to_batches(columns=names, batch_size=_BATCH_USERS, batch_readahead=2, fragment_readahead=1):
        if batch.num_rows:
            yield pa.Table.from_batches([batch]).cast(schema)


def num_users(dump_dir: str, version: int | None = None) -> int:
    """Rows of a version, out of the files' footers."""
    return int(_readable(dump_dir, version).to_pyarrow_dataset().count_rows())


def restore(dump_dir: str, version: int, tombstones: Tombstones) -> int:
    """Make the lists of a version current again, in one commit; returns the version readers see then.

    Does nothing where they are current already. Raises ArtifactError where the version holds no lists, cannot be read
    any more, or holds somebody who was erased since; ResourceError where somebody else publishes at the same time.
    """
    wanted, current = _readable(dump_dir, version), open_table(dump_dir)
    if delta_files(wanted) == delta_files(current):
        return int(current.version())
    if not delta_files(wanted):
        raise ArtifactError(f"version {version} of {dump_dir} holds no lists; restore one that does")
    if _holds_erased(dump_dir, version, tombstones):
        raise ArtifactError(
            f"version {version} of {dump_dir} holds users who were erased since and cannot be current again; restore a "
            "newer one, or run cllm4rec nightly"
        )
    facts = _facts_at(dump_dir, version) | {"restored_version": str(version)}
    try:
        current.restore(version, commit_properties=CommitProperties(custom_metadata=facts))
    except CommitFailedError:
        raise ResourceError(
            f"somebody else has just published to {dump_dir}; look at its versions and run the same command again"
        ) from None
    return int(open_table(dump_dir).version())


def export(
    dump_dir: str, version: int | None, target: str, file_format: str, tombstones: Tombstones, force: bool = False
) -> int:
    """Write a version to one file, whole or not at all; returns the number of users in it, the erased left out.

    `parquet` has the table's columns; `jsonl` an object a user with the same names; `csv` a row a recommended item:
    user_id, rank (from 1), item_id, score, so that a user with an empty list is not in it. Raises ConfigError where
    `target` exists and `force` is not set, or is a directory; ArtifactError where the version cannot be read.
    """
    fs, path = files.filesystem(target)
    if fs.isdir(path) or (fs.exists(path) and not force):
        what = "is a directory; name a file in it" if fs.isdir(path) else "exists; --force replaces it"
        raise ConfigError(f"{target} {what}")
    parts = (_without_erased(table, tombstones) for table in tables(dump_dir, version))
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


def lookup(dump_dir: str, version: int | None, user_id: str, tombstones: Tombstones) -> dict[str, Any]:
    """A user's row. Reads the ids up to theirs and one group of lists.

    Raises DataError where the user has no list in that version or was erased (nobody is told which).
    """
    table = _readable(dump_dir, version)
    is_user = pc.field("user_id") == user_id
    fragments = [] if tombstones.contains([user_id])[0] else table.to_pyarrow_dataset().get_fragments()
    for fragment in fragments:
        for group in fragment.split_by_row_group(is_user):  # those whose least and greatest id allow it
            if group.count_rows(filter=is_user):
                row: dict[str, Any] = group.to_table(filter=is_user, columns=SCHEMA.names).to_pylist()[0]
                return row
    raise DataError(
        f"this user has no list in version {table.version()} of {dump_dir}; give the id as it stands in the data"
    )


def vacuum(dump_dir: str, keep_days: int, dry_run: bool) -> Vacuumed:
    """Remove what readers of the current version do not need: files replaced more than `keep_days` days ago, and staged
    files of that age which were never published. With `dry_run` only tell. The log keeps the versions' numbers.
    """
    table = open_table(dump_dir)
    read_by = {one.version: set(_files_of(dump_dir, one.version)) for one in versions(dump_dir) if one.num_users}
    # `full`, for a usual vacuum knows nothing of files that no commit names. No check of the retention: `keep_days` is it.
    clean = {"retention_hours": 24 * keep_days, "enforce_retention_duration": False, "full": True}
    # The log goes on naming files that an earlier vacuum has removed.
    doomed = set(table.vacuum(**clean, dry_run=True)) & set(files.list_files(dump_dir))
    fs, root = files.filesystem(dump_dir)
    num_bytes = sum(int(fs.size(f"{root}/{name}")) for name in doomed)
    if not dry_run:
        table.vacuum(**clean, dry_run=False)
        _remove_empty_folders(dump_dir)
    return Vacuumed(len(doomed), num_bytes, [version for version, files in read_by.items() if files & doomed])


def _readable(dump_dir: str, version: int | None) -> DeltaTable:
    table = open_table(dump_dir, version)
    if not set(delta_files(table)) <= set(files.list_files(dump_dir)):
        raise ArtifactError(
            f"version {table.version()} of {dump_dir} can be read no more: its files were removed by a vacuum; "
            "`versions` lists those that can"
        )
    return table


def _files_of(dump_dir: str, version: int) -> list[str]:
    return delta_files(open_table(dump_dir, version))


def _num_users(dump_dir: str, names: list[str], on_disk: set[str], counted: dict[str, int]) -> int | None:
    """Rows of these files, each of which is `counted` once; None where one is gone or damaged."""
    if not set(names) <= on_disk:
        return None
    fs, root = files.filesystem(dump_dir)
    for name in set(names) - set(counted):
        try:
            with fs.open(f"{root}/{name}", "rb") as stream:
                counted[name] = pq.read_metadata(stream).num_rows
        except (OSError, pa.ArrowInvalid):
            return None
    return sum(counted[name] for name in names)


def _commits(dump_dir: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Version and commit info, oldest first. Out of the log itself: `history()` numbers wrongly while others commit."""
    log = files.join(dump_dir, "_delta_log")
    for name in files.list_files(log):
        if _COMMIT.fullmatch(name):
            lines = files.read_bytes(files.join(log, name)).splitlines()
            for action in map(json.loads, lines):
                if "commitInfo" in action:
                    yield int(name.partition(".")[0]), action["commitInfo"]


def _facts_at(dump_dir: str, version: int) -> dict[str, str]:
    """The run whose lists a version holds: that of the newest commit until then which names one."""
    named = [commit for number, commit in _commits(dump_dir) if number <= version and "run_id" in commit]
    return {name: str(named[-1][name]) for name in _FACTS if name in named[-1]} if named else {}


def _holds_erased(dump_dir: str, version: int, tombstones: Tombstones) -> bool:
    if not len(tombstones):
        return False
    return any(tombstones.contains(_user_ids(table)).any() for table in tables(dump_dir, version, ["user_id"]))


def _without_erased(table: pa.Table, tombstones: Tombstones) -> pa.Table:
    return table.filter(pa.array(~tombstones.contains(_user_ids(table)))) if len(tombstones) else table


def _user_ids(table: pa.Table) -> Any:
    return table["user_id"].to_numpy(zero_copy_only=False)


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
            writer.write_table(_a_row_an_item(table, schema))
            num_written += len(table)
    return num_written


def _a_row_an_item(table: pa.Table, schema: pa.Schema) -> pa.Table:
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


def _remove_empty_folders(dump_dir: str) -> None:
    """An empty folder of a run looks as if the run had staged something; an object store has none."""
    fs, root = files.filesystem(dump_dir)
    if isinstance(fs, LocalFileSystem):
        for folder, _, _ in os.walk(root, topdown=False):
            if folder != root:
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(folder)
