"""The published table `dump/`: staged files become visible in one Delta commit, or not at all.

Readers open the table (`deltalake`, pandas, Polars, DuckDB, Spark); it does not contain staged files of unpublished runs.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction

from cllm4rec.errors import ArtifactError, ResourceError
from cllm4rec.storage import files
from cllm4rec.storage.files import join

SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_ids", pa.list_(pa.string()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
        pa.field("run_date", pa.string(), nullable=False),
        pa.field("model_version", pa.string(), nullable=False),
    ]
)
"""One row per user, best item first: the contract of the table."""
SCHEMA_VERSION = 1
"""A property of every commit; it grows when a column is removed or changes its meaning, not when one is added."""

# Every publication takes the next number of this application, so Delta refuses one of two concurrent publications. Without
# it, two overwrites of an empty table would both succeed, and every user would be in the table twice.
_TURN = "publish"
_MOST_TRIES = 20
_PAUSE_S = 0.1


def delta_files(table: DeltaTable) -> list[str]:
    """The files of a version, as paths below the table. (`file_uris` encodes a space in the table's own path as %20.)"""
    return sorted(str(fragment.path) for fragment in table.to_pyarrow_dataset().get_fragments())


def published_attempt(dump_dir: str, run_id: str) -> int:
    """How often a run was published; 0 if there is no table."""
    table = open_current(dump_dir)
    return 0 if table is None else table.transaction_version(run_id) or 0


def open_current(dump_dir: str) -> DeltaTable | None:
    """The table as readers see it; None if nothing was published. Raises ArtifactError if it cannot be read."""
    try:
        return DeltaTable(files.absolute(dump_dir))
    except TableNotFoundError:
        return None
    except DeltaError as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"the table {dump_dir} cannot be read ({reason}); restore it from a backup, or move it away"
        ) from None


def current_run(dump_dir: str) -> str | None:
    """The run whose lists readers see; None if nothing was published."""
    table = open_current(dump_dir)
    commits = [] if table is None else table.history()
    run_ids: list[str] = [commit["run_id"] for commit in commits if "run_id" in commit]
    return run_ids[0] if run_ids else None


def current_files(dump_dir: str) -> list[str]:
    """URIs of the files of the current version; none if nothing was published."""
    table, location = open_current(dump_dir), files.absolute(dump_dir)
    return [] if table is None else [join(location, name) for name in delta_files(table)]


def publish(dump_dir: str, staged: list[str], run_id: str, attempt: int, properties: dict[str, Any]) -> int:
    """Make the staged files (paths below `dump_dir`) the whole content of the table; returns the new version.

    Publishing the same attempt of a run again does nothing. Older versions stay readable by their numbers. `properties`
    are added to the commit.
    """
    metadata = {name: str(value) for name, value in properties.items()}
    metadata |= {"run_id": run_id, "schema_version": str(SCHEMA_VERSION)}
    for _ in range(_MOST_TRIES):
        try:
            table = _open_or_create(dump_dir)
            if (table.transaction_version(run_id) or 0) >= attempt:
                return _version_of(dump_dir, run_id, attempt)
            turn = (table.transaction_version(_TURN) or 0) + 1
            table.create_write_transaction(
                _add_actions(dump_dir, staged),
                mode="overwrite",
                schema=SCHEMA,
                commit_properties=CommitProperties(
                    custom_metadata=metadata,
                    app_transactions=[Transaction(run_id, attempt), Transaction(_TURN, turn)],
                ),
            )
        except CommitFailedError:
            time.sleep(_PAUSE_S)  # another process was first; read the table again
    raise ResourceError(f"other processes keep publishing to {dump_dir}; run the same command again")


def _open_or_create(dump_dir: str) -> DeltaTable:
    table = open_current(dump_dir)
    if table is not None:
        return table
    DeltaTable.create(files.absolute(dump_dir), schema=SCHEMA, mode="ignore", name="recommendations")
    return DeltaTable(files.absolute(dump_dir))


def _version_of(dump_dir: str, run_id: str, attempt: int) -> int:
    """The version in which an attempt was published, or the oldest later version in the log.

    `history()` is not used, because it numbers its entries wrongly while others commit.
    """
    location = files.absolute(dump_dir)
    version = int(DeltaTable(location).version())
    with contextlib.suppress(DeltaError):  # old entries of the log may have been removed
        while version and (DeltaTable(location, version=version - 1).transaction_version(run_id) or 0) >= attempt:
            version -= 1
    return version


def _add_actions(dump_dir: str, staged: list[str]) -> list[AddAction]:
    fs, root = files.filesystem(dump_dir)
    sizes = {name: int(fs.size(f"{root}/{name}")) for name in staged}
    now_ms = int(time.time() * 1000)
    return [AddAction(name, size, {}, now_ms, True, json.dumps({})) for name, size in sizes.items()]
