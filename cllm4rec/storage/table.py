"""The `dump/` table: files that were staged inside it become visible in one Delta commit, or not at all.

Readers open the table (`deltalake`, pandas, Polars, DuckDB, Spark); staged files of an unpublished run are not in it.
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
"""One row a user, best item first: the contract of the table."""
SCHEMA_VERSION = 1
"""Written to every commit; it grows when a column goes or changes its meaning, not when one is added."""

# Every publication takes the next number of this application, so that of two at once Delta refuses one. Without it two
# overwrites of an empty table both go through, and every user is in it twice.
_TURN = "publish"
_MOST_TRIES = 20
_PAUSE_S = 0.1


def delta_files(table: DeltaTable) -> list[str]:
    """The files of a Delta table's version, as paths below it. (`file_uris` spells a space above it as %20.)"""
    return sorted(str(fragment.path) for fragment in table.to_pyarrow_dataset().get_fragments())


def published_attempt(dump_dir: str, run_id: str) -> int:
    """How often a run was published: 0 where never (or where there is no table)."""
    table = open_current(dump_dir)
    return 0 if table is None else table.transaction_version(run_id) or 0


def open_current(dump_dir: str) -> DeltaTable | None:
    """The table as readers see it; None where nothing was published. Raises ArtifactError where it cannot be read."""
    try:
        return DeltaTable(files.absolute(dump_dir))
    except TableNotFoundError:
        return None
    except DeltaError as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"the table {dump_dir} cannot be read ({reason}); restore it or move it away") from None


def current_run(dump_dir: str) -> str | None:
    """The run whose lists readers see; None where nothing was published."""
    table = open_current(dump_dir)
    commits = [] if table is None else table.history()
    run_ids: list[str] = [commit["run_id"] for commit in commits if "run_id" in commit]
    return run_ids[0] if run_ids else None


def current_files(dump_dir: str) -> list[str]:
    """URIs of the files readers see; none where nothing was published."""
    table, location = open_current(dump_dir), files.absolute(dump_dir)
    return [] if table is None else [join(location, name) for name in delta_files(table)]


def publish(dump_dir: str, staged: list[str], run_id: str, attempt: int, facts: dict[str, Any]) -> int:
    """Make the staged files (paths below `dump_dir`) the whole content of the table; returns the version with them.

    Publishing the same attempt of a run again does nothing. The old version stays readable by its number. `facts` are
    written to the commit.
    """
    properties = {name: str(value) for name, value in facts.items()}
    properties |= {"run_id": run_id, "schema_version": str(SCHEMA_VERSION)}
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
                    custom_metadata=properties,
                    app_transactions=[Transaction(run_id, attempt), Transaction(_TURN, turn)],
                ),
            )
        except CommitFailedError:
            time.sleep(_PAUSE_S)  # somebody else was first: look again at what is there
    raise ResourceError(f"{dump_dir} is being published to by others all the time; run the same command again")


def _open_or_create(dump_dir: str) -> DeltaTable:
    table = open_current(dump_dir)
    if table is not None:
        return table
    DeltaTable.create(files.absolute(dump_dir), schema=SCHEMA, mode="ignore", name="recommendations")
    return DeltaTable(files.absolute(dump_dir))


def _version_of(dump_dir: str, run_id: str, attempt: int) -> int:
    """The version in which an attempt was published, or the oldest that is still kept after it.

    Not out of `history()`: while others commit, it numbers its entries wrongly.
    """
    location = files.absolute(dump_dir)
    version = int(DeltaTable(location).version())
    with contextlib.suppress(DeltaError):  # the log is cleaned up from its old end
        while version and (DeltaTable(location, version=version - 1).transaction_version(run_id) or 0) >= attempt:
            version -= 1
    return version


def _add_actions(dump_dir: str, staged: list[str]) -> list[AddAction]:
    fs, root = files.filesystem(dump_dir)
    sizes = {name: int(fs.size(f"{root}/{name}")) for name in staged}
    now_ms = int(time.time() * 1000)
    return [AddAction(name, size, {}, now_ms, True, json.dumps({})) for name, size in sizes.items()]
