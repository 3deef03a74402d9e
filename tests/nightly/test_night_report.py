"""The report of a night tells what was measured, what was refused and why, to programs and to people alike."""

import json

import pyarrow as pa
import pytest

from cllm4rec.nightly.drift import COLUMNS, compare
from cllm4rec.nightly.report import DriftReport, markdown, write_report

LISTS = pa.table([["a", "b"], [["x"], ["y"]], [[2.0], [1.0]]], names=COLUMNS)
FACTS = {
    "status": "published", "table_version": 7, "run_id": "1f3a", "attempt": 2, "run_date": "2026-11-20",
    "model_version": "m", "seconds": {"score": 1234.56}, "users": 41_000, "short_lists": 3, "capped_lists": 0,
    "sha256": {"one": "0", "two": "1"}, "histories": {"users": 41_000, "events": {"rows": 6, "kept": 4}},
    "rules": {"blocked": 2, "pinned": 0}, "users_per_s": 83.25, "cost": {"unit": "core-hours", "per_million_users": 6.6667},
}  # fmt: skip


@pytest.fixture
def compared():
    return DriftReport(compare(LISTS, LISTS.slice(1), (["x", "y"], [3, 1])), LISTS, LISTS.slice(1))


def rows_of(report: str) -> dict[str, str]:
    cells = [line.split(" | ") for line in report.splitlines() if line.startswith("| ")]
    return {key.removeprefix("| "): value.removesuffix(" |") for key, value in (row for row in cells if len(row) == 2)}


def test_the_report_for_people_can_be_made_again_from_the_one_for_programs(compared, tmp_path):
    facts = FACTS | {"drift": compared.facts(), "drift_breaches": ["Half are gone."], "users_gone_such_as": ["0a1b"]}
    write_report(str(tmp_path), facts, compared)
    plots = ["drift_scores.png", "drift_items.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", *plots}
    told = (tmp_path / "report.md").read_text()
    again = markdown(json.loads((tmp_path / "report.json").read_text()), plots)
    assert sorted(again.splitlines()) == sorted(told.splitlines()), "but for the order of rows: JSON is sorted"
    drift = {name.replace("_", " ") for name, value in compared.facts().items() if isinstance(value, int | float)}
    assert drift <= rows_of(told).keys()
    assert "quantiles" not in told
    assert rows_of(told)["users gone"] == "0.5"
    assert "- Half are gone." in told
    assert "by hash: 0a1b." in told
    assert "![drift scores](drift_scores.png)" in told


def test_the_report_tells_counts_costs_and_what_was_left_out():
    told = markdown(FACTS, [])
    assert "Published as version 7 of the table." in told
    rows = rows_of(told)
    assert (rows["run"], rows["users"], rows["files"]) == ("1f3a, attempt 2", "41,000", "2")
    assert (rows["events: rows"], rows["events: kept"], rows["blocked"]) == ("6", "4", "2")
    assert "pinned" not in rows
    assert (rows["score"], rows["core-hours a million users"]) == ("1,234.6 s", "6.667")
    assert "Nothing to compare with." in told


def test_a_refused_night_tells_why_and_what_it_did_not_measure():
    refused = {name: FACTS[name] for name in ("run_id", "attempt", "run_date", "model_version", "seconds")}
    told = markdown(refused | {"status": "refused", "reason": "A list is too short."}, [])
    assert "**Not published.** A list is too short." in told
    assert rows_of(told)["users"] == "not measured"
    assert "Nothing was left out or moved" in told
