"""The report of a night states what was measured, what was refused and why, for programs and for people."""

import dataclasses
import json

import pyarrow as pa
import pytest

from cllm4rec.nightly.drift import COLUMNS, compare
from cllm4rec.nightly.report import Cost, NightReport, markdown, write_report

LISTS = pa.table([["a", "b"], [["x"], ["y"]], [[2.0], [1.0]]], names=COLUMNS)
BEGUN = NightReport(
    run_id="1f3a", attempt=2, run_date="2026-11-20", model_version="m", model_dir="d", inputs={"model": "0"}
)
PUBLISHED = dataclasses.replace(
    BEGUN, status="published", table_version=7, seconds={"score": 1234.56}, users=41_000, short_lists=3, capped_lists=0,
    sha256={"one": "0", "two": "1"}, histories={"users": 41_000, "events": {"rows": 6, "kept": 4}},
    rules={"blocked": 2, "pinned": 0}, users_scored=41_000, users_per_s=83.25, cost=Cost("core-hours", 6.6667),
)  # fmt: skip


@pytest.fixture
def compared():
    drift = compare(LISTS, LISTS.slice(1), (["x", "y"], [3, 1]))
    return dataclasses.replace(PUBLISHED, drift=drift, drift_breaches=["Half are lost."], users_gone_such_as=["0a1b"])


def rows_of(report: str) -> dict[str, str]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line[:2] == "| "]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def test_the_report_for_people_can_be_made_again_from_the_one_for_programs(compared, tmp_path):
    write_report(str(tmp_path), compared, (LISTS, LISTS.slice(1)))
    plots = ["drift_scores.png", "drift_items.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", *plots}
    text = (tmp_path / "report.md").read_text()
    again = markdown(NightReport.from_json(json.loads((tmp_path / "report.json").read_text())), plots)
    assert sorted(again.splitlines()) == sorted(text.splitlines()), "only the order of rows differs: JSON is sorted"
    values = dataclasses.asdict(compared.drift).items()
    assert {name.replace("_", " ") for name, value in values if isinstance(value, int | float)} <= rows_of(text).keys()
    assert "quantiles" not in text
    assert rows_of(text)["users gone"] == "0.5"
    assert "- Half are lost." in text
    assert "hashed ids: 0a1b." in text
    assert "![drift scores](drift_scores.png)" in text


def test_the_file_for_programs_holds_what_was_measured_and_no_empty_fields(compared, tmp_path):
    write_report(str(tmp_path / "begun"), dataclasses.replace(BEGUN, status="refused", reason="No."), None)
    begun = json.loads((tmp_path / "begun" / "report.json").read_text())
    always = {"run_id", "attempt", "run_date", "model_version", "model_dir", "inputs", "status", "seconds"}
    assert begun.keys() == {*always, "reason"}
    assert compared.to_json().keys() == always | {
        "table_version", "rules", "histories", "users", "short_lists", "capped_lists", "sha256", "users_scored",
        "users_per_s", "cost", "drift", "drift_breaches", "users_gone_such_as",
    }  # fmt: skip
    assert compared.to_json()["cost"] == {"unit": "core-hours", "per_million_users": 6.6667}
    assert compared.to_json()["drift"]["users_gone"] == 0.5


def test_the_report_shows_counts_costs_and_the_effect_of_rules():
    text = markdown(PUBLISHED, [])
    assert "Published as version 7 of the table." in text
    rows = rows_of(text)
    assert (rows["run"], rows["users"], rows["files"]) == ("1f3a, attempt 2", "41,000", "2")
    assert (rows["events: rows"], rows["events: kept"], rows["blocked"]) == ("6", "4", "2")
    assert "pinned" not in rows
    assert (rows["score"], rows["core-hours per million users"]) == ("1,234.6 s", "6.667")
    assert "Not measured: there is no earlier table" in text


def test_a_refused_night_states_why_and_what_it_did_not_measure():
    text = markdown(dataclasses.replace(BEGUN, status="refused", reason="A list is too short."), [])
    assert "**Not published.** A list is too short." in text
    assert rows_of(text)["users"] == "not measured"
    assert "No rule removed or changed an item." in text
