"""The first pass, with executors that hand over blocks in other sizes and orders than files have them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cllm4rec.config import Columns
from cllm4rec.data.formats import Layout
from cllm4rec.data.ingest import Ingested, by_column, ingest
from cllm4rec.data.ray_data import LocalExecutor, Read, Task
from cllm4rec.data.records import Limits
from cllm4rec.storage.files import read_tables

Arrange = Callable[[list[pa.Table]], list[pa.Table]]


class Arranged(LocalExecutor):
    """Rearranges the blocks of all files before tasks see them."""

    def __init__(self, arrange: Arrange) -> None:
        self.arrange = arrange

    def map_files(self, files: Sequence[Mapping[str, Any]], read: Read, task: Task) -> Iterator[pa.Table]:
        blocks = list(super().map_files(files, read, lambda block: iter([block])))
        yield from self.map_tables(self.arrange(blocks), task)


ARRANGEMENTS: dict[str, Arrange] = {
    "as read": lambda blocks: blocks,
    "reversed": lambda blocks: blocks[::-1],
    "halves": lambda blocks: [half for block in blocks for half in (block.slice(3), block.slice(0, 3))],
    "one block": lambda blocks: [pa.concat_tables(blocks)],
    "one block, reversed": lambda blocks: [pa.concat_tables(blocks[::-1])],
}


@pytest.fixture
def layouts(tmp_path: Path) -> list[Layout]:
    """Two sources: interactions in two files, items in one."""
    for file in range(2):
        rows = "".join(f'{{"u": "u{row % 3}", "i": "i{file}", "t": "text {file} {row}"}}\n' for row in range(5))
        (tmp_path / f"{file}.jsonl").write_text(f"{rows}nonsense\n")
    (tmp_path / "items.jsonl").write_text('{"i": "i1", "t": "one"}\nnonsense\n{"i": "i0", "t": "none"}\n')
    files = tuple(str(tmp_path / f"{file}.jsonl") for file in range(2))
    return [
        Layout("interactions", files, "jsonl", Columns(user="u", item="i", text="t")),
        Layout("items", (str(tmp_path / "items.jsonl"),), "jsonl", Columns(item="i", text="t")),
    ]


def ingested_by(arrange: Arrange, layouts: list[Layout], staging: Path) -> Ingested:
    return ingest(layouts, Limits(1000, 20), str(staging), Arranged(arrange))


def readable(ingested: Ingested, staging: Path) -> list[list[tuple[Any, ...]]]:
    """User, item and text of every row of each source."""
    texts = [read_tables([f"{staging}/{name}"])["text"].to_pylist() for name in ingested.text_files]
    return [
        [
            (
                ingested.user_ids[user] if user >= 0 else None,
                ingested.item_ids[item],
                texts[text_file][text_row],
            )
            for user, item, text_file, text_row in zip(rows.user, rows.item, rows.text_file, rows.text_row, strict=True)
        ]
        for rows in ingested.rows
    ]


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_rows_come_in_the_order_of_files_whatever_was_done_first(
    name: str, layouts: list[Layout], tmp_path: Path
) -> None:
    ingested = ingested_by(ARRANGEMENTS[name], layouts, tmp_path)
    interactions, items = readable(ingested, tmp_path)
    assert interactions == [(f"u{row % 3}", f"i{file}", f"text {file} {row}") for file in range(2) for row in range(5)]
    assert items == [(None, "i1", "one"), (None, "i0", "none")]
    assert ingested.rows_in == [12, 3]
    assert ingested.refused.to_pylist() == [
        {"source": source, "file": file, "line": line, "reason": "not a JSON object"}
        for source, file, line in [
            ("interactions", "0.jsonl", 6),
            ("interactions", "1.jsonl", 6),
            ("items", "items.jsonl", 2),
        ]
    ]


def test_a_block_of_several_files_is_staged_file_by_file(layouts: list[Layout], tmp_path: Path) -> None:
    assert len(ingested_by(ARRANGEMENTS["one block"], layouts, tmp_path).text_files) == 3


def test_a_task_run_again_writes_the_same_staging_file_again(layouts: list[Layout], tmp_path: Path) -> None:
    once, twice = (ingested_by(ARRANGEMENTS["as read"], layouts, tmp_path / "staging") for _ in range(2))
    assert once.text_files == twice.text_files
    assert len(list((tmp_path / "staging").iterdir())) == len(once.text_files)


def test_by_column_parts_a_table_by_value() -> None:
    table = pa.table({"key": [2, 0, 2, 5], "value": [1, 2, 3, 4]})
    parts = [
        (part["key"][0].as_py(), part["value"].to_pylist()) for part in by_column([table, table.slice(0, 0)], "key")
    ]
    assert parts == [(0, [2]), (2, [1, 3]), (5, [4])]
