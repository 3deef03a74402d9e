"""The first pass without Ray: its two tasks and the collecting driver as plain functions."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cllm4rec.config import Columns
from cllm4rec.data.formats import Layout
from cllm4rec.data.ingest import Staged, _collect, _read_files, _stage_block, by_column
from cllm4rec.data.records import Limits
from cllm4rec.storage.files import read_tables

LIMITS = Limits(1000, 20)


@pytest.fixture
def layouts(tmp_path: Path) -> list[Layout]:
    """Two sources: interactions in two files, items in one."""
    for file in range(2):
        rows = "".join(f'{{"u": "u{row % 3}", "i": "i{file}", "t": "text {file} {row}"}}\n' for row in range(5))
        (tmp_path / f"{file}.jsonl").write_text(f"{rows}nonsense\n")
    (tmp_path / "items.jsonl").write_text('{"i": "i1", "t": "one"}\nnonsense\n{"i": "i0", "t": "none"}\n')
    facts = tuple(str(tmp_path / f"{file}.jsonl") for file in range(2))
    return [
        Layout("interactions", facts, "jsonl", Columns(user="u", item="i", text="t")),
        Layout("items", (str(tmp_path / "items.jsonl"),), "jsonl", Columns(item="i", text="t")),
    ]


def records_of(layouts: list[Layout]) -> list[pa.Table]:
    batch = {
        "source": np.array([0, 0, 1]),
        "number": np.array([0, 1, 0]),
        "file": np.array([*layouts[0].files, *layouts[1].files]),
    }
    return list(_read_files(batch, layouts, LIMITS))


def staged_from(blocks: list[pa.Table], layouts: list[Layout], staging: Path) -> Staged:
    return _collect([rows for block in blocks for rows in _stage_block(block, layouts, LIMITS, str(staging))], layouts)


def readable(staged: Staged, staging: Path) -> list[list[tuple[Any, ...]]]:
    """User, item and text of every row of each source."""
    texts = [read_tables([f"{staging}/{name}"])["text"].to_pylist() for name in staged.fragments]
    return [
        [
            (
                staged.user_ids[user] if user >= 0 else None,
                staged.item_ids[item],
                texts[fragment][place],
            )
            for user, item, fragment, place in zip(rows.user, rows.item, rows.fragment, rows.place, strict=True)
        ]
        for rows in staged.rows
    ]


def test_rows_come_in_the_order_of_files_whatever_was_done_first(layouts: list[Layout], tmp_path: Path) -> None:
    records = records_of(layouts)
    halves = [half for table in records for half in (table.slice(3), table.slice(0, 3))]
    for name, blocks in {"whole": records, "reversed": records[::-1], "halves": halves}.items():
        staged = staged_from(blocks, layouts, tmp_path / name)
        facts, items = readable(staged, tmp_path / name)
        assert facts == [(f"u{row % 3}", f"i{file}", f"text {file} {row}") for file in range(2) for row in range(5)]
        assert items == [(None, "i1", "one"), (None, "i0", "none")]
        assert staged.rows_in == [12, 3]
        assert staged.refused.to_pylist() == [
            {"source": source, "file": file, "line": line, "reason": "not a JSON object"}
            for source, file, line in [
                ("interactions", "0.jsonl", 6),
                ("interactions", "1.jsonl", 6),
                ("items", "items.jsonl", 2),
            ]
        ]


def test_a_block_of_several_files_is_staged_file_by_file(layouts: list[Layout], tmp_path: Path) -> None:
    staged = staged_from([pa.concat_tables(records_of(layouts))], layouts, tmp_path / "joined")
    assert len(staged.fragments) == 3
    assert readable(staged, tmp_path / "joined")[1] == [(None, "i1", "one"), (None, "i0", "none")]


def test_a_task_run_again_writes_the_same_staging_file_again(layouts: list[Layout], tmp_path: Path) -> None:
    records = records_of(layouts)
    once = staged_from(records, layouts, tmp_path / "staging")
    twice = staged_from(records, layouts, tmp_path / "staging")
    assert once.fragments == twice.fragments
    assert len(list((tmp_path / "staging").iterdir())) == len(once.fragments)


def test_by_column_parts_a_table_by_value() -> None:
    table = pa.table({"key": [2, 0, 2, 5], "value": [1, 2, 3, 4]})
    parts = [
        (part["key"][0].as_py(), part["value"].to_pylist()) for part in by_column([table, table.slice(0, 0)], "key")
    ]
    assert parts == [(0, [2]), (2, [1, 3]), (5, [4])]
