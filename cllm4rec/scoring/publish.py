"""The `dump/` table: files that were staged inside it become visible in one Delta commit, or not at all.

Readers open the table (`deltalake`, pandas, Polars, DuckDB, Spark); staged files of an unpublished run are not part of it.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction

from cllm4rec import artifacts

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


def published_attempt(dump_dir: str, run_id: str) -> int:
    """How often a run was published: 0 where never (or where there is no table)."""
    try:
        return DeltaTable(artifacts.absolute(dump_dir)).transaction_version(run_id) or 0
    except TableNotFoundError:
        return 0


def publish(dump_dir: str, staged: list[str], run_id: str, attempt: int, facts: dict[str, Any]) -> int:
    """Make the staged files (paths below `dump_dir`) the whole content of the table; returns the new version.

    Publishing the same attempt of a run again does nothing. The old version stays readable by its number.
    """
    location = artifacts.absolute(dump_dir)
    DeltaTable.create(location, schema=SCHEMA, mode="ignore", name="recommendations")
    table = DeltaTable(location)
    if (table.transaction_version(run_id) or 0) >= attempt:
        return int(table.version())
    fs, root = artifacts.filesystem(dump_dir)
    actions = [_add(fs, root, name) for name in staged]
    try:
        table.create_write_transaction(
            actions,
            mode="overwrite",
            schema=SCHEMA,
            commit_properties=CommitProperties(
                custom_metadata={name: str(value) for name, value in facts.items()},
                app_transactions=[Transaction(run_id, attempt)],
            ),
        )
    except CommitFailedError:
        table = DeltaTable(location)
        if (table.transaction_version(run_id) or 0) < attempt:
            raise
    return int(DeltaTable(location).version())


def _add(fs: Any, root: str, name: str) -> AddAction:
    info = fs.info(f"{root}/{name}")
    modified_ms = int(float(info.get("mtime", 0)) * 1000) if isinstance(info.get("mtime", 0), int | float) else 0
    return AddAction(name, int(info["size"]), {}, modified_ms, True, json.dumps({}))
