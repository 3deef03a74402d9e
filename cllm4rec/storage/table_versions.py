"""Versions of the published table: list, restore, look up a user, vacuum.

Readers are unaffected: a published version never changes, and a restored version is a new one with the old content. No
function loads the whole table or writes a user id to its log. Callers that change the table (`restore`, `vacuum`) hold its
lease (`cllm4rec.storage.lease`), so that no run is staging files meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from fsspec.implementations.local import LocalFileSystem

from cllm4rec.errors import ArtifactError, DataError, ResourceError
from cllm4rec.storage import files
from cllm4rec.storage.table import SCHEMA, delta_files, open_current
from cllm4rec.storage.tombstones import Tombstones

BATCH_USERS = 16_384
_COMMIT = re.compile(r"\d{20}\.json")
_PROPERTIES = ("run_id", "run_date", "model_version", "schema_version")
# Commits that do not change the lists.
_NO_LISTS = ("CREATE TABLE", "VACUUM START", "VACUUM END")


@dataclasses.dataclass(frozen=True)
class Version:
    """A version in which the lists changed. facts: properties of its run. num_users: None if it is no longer readable."""

    version: int
    time: str
    operation: str
    facts: dict[str, str]
    num_users: int | None


@dataclasses.dataclass(frozen=True)
class Vacuumed:
    """The removed files (or those to remove), and the versions that are no longer readable without them."""

    num_files: int
    num_bytes: int
    versions: list[int]


def versions(dump_dir: str) -> list[Version]:
    """All versions in the log, oldest first. Raises ArtifactError if there is no table."""
    open_table(dump_dir)
    on_disk, counted = set(files.list_files(dump_dir)), dict[str, int]()
    return [
        Version(
            version,
            datetime.fromtimestamp(commit["timestamp"] / 1000, UTC).isoformat(timespec="seconds"),
            commit["operation"],
            {name: commit[name] for name in _PROPERTIES if name in commit},
            _num_users(dump_dir, _files_of(dump_dir, version), on_disk, counted),
        )
        for version, commit in _commits(dump_dir)
        if commit["operation"] not in _NO_LISTS
    ]


def open_table(dump_dir: str, version: int | None = None) -> DeltaTable:
    """The table at its current or at a given version. Raises ArtifactError if it does not exist."""
    table = open_current(dump_dir) if version is None else _open_version(dump_dir, version)
    if table is None:
        raise ArtifactError(f"{dump_dir} is not a table yet; run cllm4rec nightly or cllm4rec score to publish one")
    return table


def _open_version(dump_dir: str, version: int) -> DeltaTable | None:
    try:
        return DeltaTable(files.absolute(dump_dir), version=version)
    except TableNotFoundError:
        return None
    except (DeltaError, OverflowError):
        raise ArtifactError(
            f"{dump_dir} has no version {version}; cllm4rec dump --config FILE versions lists all versions"
        ) from None


def tables(
    dump_dir: str,
    version: int | None = None,
    columns: Sequence[str] | None = None,
    batch_users: int = BATCH_USERS,
) -> Iterator[pa.Table]:
    """The rows of a version, at most `batch_users` at a time. Raises ArtifactError if its files were removed."""
    names = list(columns) if columns is not None else SCHEMA.names
    schema = pa.schema([SCHEMA.field(name) for name in names])
    dataset = _readable(dump_dir, version).to_pyarrow_dataset()
    # Small batches and a short read-ahead: with Arrow's defaults, gigabytes of lists would be in memory.
    for batch in dataset.to_batches(columns=names, batch_size=batch_users, batch_readahead=2, fragment_readahead=1):
        if batch.num_rows:
            yield pa.Table.from_batches([batch]).cast(schema)


def num_users(dump_dir: str, version: int | None = None) -> int:
    """The number of rows of a version, from the metadata of its files."""
    return int(_readable(dump_dir, version).to_pyarrow_dataset().count_rows())


def restore(dump_dir: str, version: int, tombstones: Tombstones) -> int:
    """Make the lists of a version current again, in one commit; returns the version that readers then see.

    Does nothing if they are current already. Raises ArtifactError if the version has no lists, is no longer readable, or
    contains a user who was erased since; ResourceError if another process publishes at the same time.
    """
    wanted, current = _readable(dump_dir, version), open_table(dump_dir)
    if delta_files(wanted) == delta_files(current):
        return int(current.version())
    if not delta_files(wanted):
        raise ArtifactError(f"version {version} of {dump_dir} has no lists; restore another version")
    if _contains_erased(dump_dir, version, tombstones):
        raise ArtifactError(
            f"version {version} of {dump_dir} contains users who were erased since, so it cannot be restored; restore a "
            "newer version, or run cllm4rec nightly"
        )
    properties = _properties_at(dump_dir, version) | {"restored_version": str(version)}
    try:
        current.restore(version, commit_properties=CommitProperties(custom_metadata=properties))
    except CommitFailedError:
        raise ResourceError(
            f"another process has just published to {dump_dir}; look at its versions and run the same command again"
        ) from None
    return int(open_table(dump_dir).version())


def lookup(dump_dir: str, version: int | None, user_id: str, tombstones: Tombstones) -> dict[str, Any]:
    """The row of a user. Reads ids up to that of the user, and one row group of lists.

    Raises DataError if the user has no list in that version or was erased; the message is the same for both.
    """
    table = _readable(dump_dir, version)
    is_user = pc.field("user_id") == user_id
    fragments = [] if tombstones.contains([user_id])[0] else table.to_pyarrow_dataset().get_fragments()
    for fragment in fragments:
        for group in fragment.split_by_row_group(is_user):  # groups whose smallest and largest id allow it
            if group.count_rows(filter=is_user):
                row: dict[str, Any] = group.to_table(filter=is_user, columns=SCHEMA.names).to_pylist()[0]
                return row
    raise DataError(
        f"this user has no list in version {table.version()} of {dump_dir}; give the id as it is in the data"
    )


def vacuum(dump_dir: str, keep_days: int, dry_run: bool) -> Vacuumed:
    """Remove the files that the current version does not need and that were replaced, or staged without being published,
    more than `keep_days` days ago. With `dry_run`, only report them. The log keeps the numbers of all versions.
    """
    table = open_table(dump_dir)
    read_by = {
        found.version: set(_files_of(dump_dir, found.version)) for found in versions(dump_dir) if found.num_users
    }
    # `full`, because a usual vacuum ignores files that no commit names. `keep_days` replaces the check of the retention.
    clean = {"retention_hours": 24 * keep_days, "enforce_retention_duration": False, "full": True}
    # The log still names files that an earlier vacuum removed.
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
            f"version {table.version()} of {dump_dir} is no longer readable, because a vacuum removed its files; "
            "cllm4rec dump --config FILE versions lists the readable ones"
        )
    return table


def _files_of(dump_dir: str, version: int) -> list[str]:
    return delta_files(open_table(dump_dir, version))


def _num_users(dump_dir: str, names: list[str], on_disk: set[str], counted: dict[str, int]) -> int | None:
    """The rows of these files; None if one is missing or damaged. `counted` caches the rows of each file."""
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
    """Version and commit info, oldest first, from the log itself: `history()` numbers wrongly while others commit."""
    log = files.join(dump_dir, "_delta_log")
    for name in files.list_files(log):
        if _COMMIT.fullmatch(name):
            lines = files.read_bytes(files.join(log, name)).splitlines()
            for action in map(json.loads, lines):
                if "commitInfo" in action:
                    yield int(name.partition(".")[0]), action["commitInfo"]


def _properties_at(dump_dir: str, version: int) -> dict[str, str]:
    """The properties of the run whose lists a version has: those of the newest commit up to it that names a run."""
    named = [commit for number, commit in _commits(dump_dir) if number <= version and "run_id" in commit]
    return {name: str(named[-1][name]) for name in _PROPERTIES if name in named[-1]} if named else {}


def _contains_erased(dump_dir: str, version: int, tombstones: Tombstones) -> bool:
    if not len(tombstones):
        return False
    ids = (table["user_id"].to_numpy(zero_copy_only=False) for table in tables(dump_dir, version, ["user_id"]))
    return any(tombstones.contains(user_ids).any() for user_ids in ids)


def _remove_empty_folders(dump_dir: str) -> None:
    """An empty folder would look like staged files of a run. Object stores have no empty folders."""
    fs, root = files.filesystem(dump_dir)
    if isinstance(fs, LocalFileSystem):
        for folder, _, _ in os.walk(root, topdown=False):
            if folder != root:
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(folder)
