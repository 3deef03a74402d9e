"""Runs of lists as files to publish, and what readers of the Delta table see of them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from cllm4rec.storage.table import SCHEMA

FACTS = {"run_date": "2026-11-20", "model_version": "m"}


def stage(dump: str, name: str, users: list[str], parts: int = 2) -> list[str]:
    """Lists of a run, told apart by their item, as paths below the dump."""
    folder = Path(dump) / f"run={name}"
    folder.mkdir(parents=True)
    for part in range(parts):
        mine = users[part::parts]
        columns = [mine, [[name, "x"]] * len(mine), [[1.0, 0.5]] * len(mine), ["d"] * len(mine), ["m"] * len(mine)]
        pq.write_table(pa.table(columns, schema=SCHEMA), folder / f"part-{part}.parquet")
    return [f"run={name}/part-{part}.parquet" for part in range(parts)]


def seen(dump: str, version: int | None = None) -> dict[str, str]:
    """user_id → whose list readers see; fails where a user is there twice."""
    frame = DeltaTable(dump, version=version).to_pandas()
    assert frame["user_id"].is_unique
    return {user: items[0] for user, items in zip(frame["user_id"], frame["item_ids"], strict=True)}
