"""The report of a night: `report.json` for programs, `report.md` with plots for people.

<output_dir>/nightly/2026-11-20-<run id>-<attempt>/report.json, report.md, drift_*.png
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from cllm4rec.nightly import drift
from cllm4rec.nightly.drift import Drift
from cllm4rec.storage.files import join, write_bytes, write_json


@dataclasses.dataclass(frozen=True)
class DriftReport:
    """The drift from the last table, and the samples of both it was measured on."""

    drift: Drift
    old: pa.Table
    new: pa.Table

    def facts(self) -> dict[str, Any]:
        return dataclasses.asdict(self.drift)


def write_report(uri: str, facts: Mapping[str, Any], compared: DriftReport | None) -> None:
    """Write both reports below `uri`; those of an earlier try are replaced."""
    plots = {} if compared is None else drift.render(compared.drift, compared.old, compared.new)
    for name, content in plots.items():
        write_bytes(join(uri, name), content)
    write_bytes(join(uri, "report.md"), markdown(facts, list(plots)).encode())
    write_json(join(uri, "report.json"), facts)


def markdown(facts: Mapping[str, Any], plots: list[str]) -> str:
    """`report.md` from the content of `report.json`."""
    verdict = {
        "published": f"Published as version {facts.get('table_version')} of the table.",
        "refused": f"**Not published.** {facts.get('reason')}",
    }[facts["status"]]
    sections = [
        f"# Lists of {facts['run_date']}",
        verdict,
        _table(
            {
                "run": f"{facts['run_id']}, attempt {facts['attempt']}",
                "model": facts["model_version"],
                "users": _number(facts.get("users")),
                "lists shorter than k, for want of allowed items": _number(facts.get("short_lists")),
                "lists in which a category is full": _number(facts.get("capped_lists")),
                "files": _number(len(facts.get("sha256", {}))),
            }
        ),
        "## Histories",
        _table({key.replace("_", " "): _number(value) for key, value in _flat(facts.get("histories", {})).items()}),
        "## Rules",
        _rules_section(facts.get("rules", {})),
        "## Time and cost",
        _table(
            {
                **{part: f"{seconds:,.1f} s" for part, seconds in facts["seconds"].items()},
                "users scored a second": _number(facts.get("users_per_s")),
                f"{facts.get('cost', {}).get('unit', 'hours')} a million users": _number(
                    facts.get("cost", {}).get("per_million_users")
                ),
            }
        ),
        "## Against the last table",
        *_drift_section(facts, plots),
    ]
    return "\n\n".join(sections) + "\n"


def _rules_section(counts: Mapping[str, int]) -> str:
    rows = {key.replace("_", " "): _number(count) for key, count in counts.items() if count}
    return _table(rows) if rows else "Nothing was left out or moved beside what a user has seen."


def _drift_section(facts: Mapping[str, Any], plots: list[str]) -> list[str]:
    measured = facts.get("drift")
    if measured is None:
        return ["Nothing to compare with."]
    rows = {key.replace("_", " "): _number(value) for key, value in measured.items() if isinstance(value, int | float)}
    breaches, gone = facts.get("drift_breaches", []), facts.get("users_gone_such_as", [])
    return [
        _table(rows),
        *(f"- {breach}" for breach in breaches),
        *([f"Users who are gone, by hash: {', '.join(gone)}."] if gone else []),
        *(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots),
    ]


def _flat(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of counts as one level."""
    flat: dict[str, Any] = {}
    for key, value in counts.items():
        flat |= (
            {f"{key}: {inner}": count for inner, count in value.items()} if isinstance(value, dict) else {key: value}
        )
    return flat


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---:|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _number(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
