"""Texts whose ids match nothing: who is told, and how much of an id."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from cllm4rec.config import parse_config
from cllm4rec.data.coverage import pattern_of
from cllm4rec.data.prepare import prepare
from cllm4rec.data.ray_data import LocalExecutor


def counts_of(folder: Path, item_texts: dict[str, str], user_texts: dict[str, str]) -> dict[str, Any]:
    """Prepare 4 users and 4 items, with ids of four digits."""
    rows = [{"user": f"Ann-{user:04d}", "item": f"{item:04d}"} for user in range(4) for item in range(4)]
    lines = {"interactions": rows}
    lines["items"] = [{"item": item, "text": text} for item, text in item_texts.items()]
    lines["users"] = [{"user": user, "text": text} for user, text in user_texts.items()]
    data: dict[str, Any] = {"min_rating": None, "core": 2}
    for role, records in lines.items():
        (folder / f"{role}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        data[role] = {"path": str(folder / f"{role}.jsonl"), "columns": {name: name for name in records[0]}}
    model = {"backbone": {"vocab_size": 300}}
    config = parse_config({"output_dir": str(folder / "out"), "data": data, "model": model})
    return prepare(config, LocalExecutor()).counts


def test_texts_with_ids_in_another_spelling_are_counted_and_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = {str(item): "a title" for item in range(4)} | {"x" * 100: "a long one"}
    with caplog.at_level(logging.INFO, "cllm4rec"):
        counts = counts_of(tmp_path, items, {f"ann-{user}": "a life" for user in range(4)})
    assert counts["texts"] == {"items": {"of": 4, "with_text": 0}, "users": {"of": 4, "with_text": 0}}
    of_items, of_users = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "only 0 of 4 items have a text in data.items: 0000, 0001, 0002 have none" in of_items
    assert "the texts of 0, 1, 2 belong to none" in of_items
    assert "Aaa-9999, Aaa-9999, Aaa-9999 have none, and the texts of aaa-9, aaa-9, aaa-9 belong" in of_users
    assert "Ann" not in caplog.text
    assert "ann-" not in caplog.text


def test_texts_that_match_are_counted_without_a_warning_and_empty_ones_do_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = {"0000": "one", "0001": "two", "0002": "", "y" * 100: "an item that nobody has"}
    with caplog.at_level(logging.INFO, "cllm4rec"):
        counts = counts_of(tmp_path, items, {f"Ann-{user:04d}": "a life" for user in range(4)})
    assert counts["texts"] == {"items": {"of": 4, "with_text": 2}, "users": {"of": 4, "with_text": 4}}
    assert "texts: 2 of 4 items have one (50%)" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("user_id", "pattern"), [("0012", "0099"), ("000", "009"), ("A12-ö", "A99-a"), ("7a0", "9a9"), ("", "")]
)
def test_the_pattern_of_an_id_tells_its_spelling_only(user_id: str, pattern: str) -> None:
    assert pattern_of(user_id) == pattern
