"""The report of a scoring run: `report.json` for programs, `report.md` with plots for people.

<output_dir>/nightly/2026-11-20-<run id>-<attempt>/report.json, report.md, drift_*.png
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from cllm4rec.nightly.drift import Drift, render
from cllm4rec.reporting import markdown_table
from cllm4rec.storage.files import join, write_bytes, write_json


@dataclasses.dataclass(frozen=True)
class Cost:
    """What scoring a million users takes, in GPU-hours or core-hours; None if no user was scored."""

    unit: str
    per_million_users: float | None


@dataclasses.dataclass(frozen=True)
class NightReport:
    """The content of `report.json`. A field is None until it is measured, and then left out of the file.

    status: `interrupted` until the run is published or refused; reason: why it was refused. inputs: digests of what the
    lists depend on. seconds: of each part of the run. histories, rules: counts by name. users: the users with a list;
    users_scored: those whose lists were not staged by an earlier try. sha256: of each staged file. drift: from the lists
    published last; users_gone_such_as: hashes of three users who had a list before.
    """

    run_id: str
    attempt: int
    run_date: str
    model_version: str
    model_dir: str
    inputs: Mapping[str, str]
    status: Literal["interrupted", "published", "refused"] = "interrupted"
    reason: str | None = None
    table_version: int | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rules: Mapping[str, int] | None = None
    histories: Mapping[str, Any] | None = None
    users: int | None = None
    short_lists: int | None = None
    capped_lists: int | None = None
    sha256: Mapping[str, str] | None = None
    users_scored: int | None = None
    users_per_s: float | None = None
    cost: Cost | None = None
    drift: Drift | None = None
    drift_breaches: Sequence[str] | None = None
    users_gone_such_as: Sequence[str] | None = None

    def to_json(self) -> dict[str, Any]:
        """What was measured, as dictionaries."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> NightReport:
        cost, drift = content.get("cost"), content.get("drift")
        parts = {"cost": cost and Cost(**cost), "drift": drift and Drift(**drift)}
        return cls(**{**content, **parts})


def write_report(uri: str, report: NightReport, samples: tuple[pa.Table, pa.Table] | None) -> None:
    """Write both reports below `uri`, replacing those of an earlier try. samples: the old and the new lists that the
    drift was measured on.
    """
    plots = {} if report.drift is None or samples is None else render(report.drift, *samples)
    for name, content in plots.items():
        write_bytes(join(uri, name), content)
    write_bytes(join(uri, "report.md"), markdown(report, list(plots)).encode())
    write_json(join(uri, "report.json"), report.to_json())


def markdown(report: NightReport, plots: Sequence[str]) -> str:
    """`report.md`; `plots` are the names of image files beside it."""
    sections = [
        f"# Lists of {report.run_date}",
        _verdict(report),
        _numbers(
            {
                "run": f"{report.run_id}, attempt {report.attempt}",
                "model": report.model_version,
                "users": _number(report.users),
                "lists shorter than k, because no further item is allowed": _number(report.short_lists),
                "lists with a full category": _number(report.capped_lists),
                "files": _number(len(report.sha256 or {})),
            }
        ),
        "## Histories",
        _numbers({name: _number(value) for name, value in _flat(report.histories or {}).items()}),
        "## Rules",
        _rules_section(report.rules or {}),
        "## Time and cost",
        _numbers({**{part: f"{seconds:,.1f} s" for part, seconds in report.seconds.items()}, **_speed(report)}),
        "## Drift from the last table",
        *_drift_section(report, plots),
    ]
    return "\n\n".join(sections) + "\n"


def _verdict(report: NightReport) -> str:
    if report.status == "published":
        return f"Published as version {report.table_version} of the table."
    return f"**Not published.** {report.reason or 'The run was interrupted.'}"


def _rules_section(counts: Mapping[str, int]) -> str:
    rows = {_words(name): _number(count) for name, count in counts.items() if count}
    return _numbers(rows) if rows else "No rule removed or changed an item."


def _speed(report: NightReport) -> dict[str, str]:
    cost = report.cost or Cost("hours", None)
    return {
        "users scored per second": _number(report.users_per_s),
        f"{cost.unit} per million users": _number(cost.per_million_users),
    }


def _drift_section(report: NightReport, plots: Sequence[str]) -> list[str]:
    if report.drift is None:
        return ["Not measured: there is no earlier table, or this is not a nightly run."]
    values = dataclasses.asdict(report.drift)
    numbers = {_words(name): _number(value) for name, value in values.items() if isinstance(value, int | float)}
    examples = report.users_gone_such_as
    return [
        _numbers(numbers),
        *(f"- {breach}" for breach in report.drift_breaches or ()),
        *([f"Users without a list who had one before, as hashed ids: {', '.join(examples)}."] if examples else []),
        *(f"![{_words(name.removesuffix('.png'))}]({name})" for name in plots),
    ]


def _flat(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Counts by name, nested counts as `name: inner name`."""
    flat: dict[str, Any] = {}
    for name, value in counts.items():
        nested = value if isinstance(value, dict) else {None: value}
        flat |= {_words(name if inner is None else f"{name}: {inner}"): count for inner, count in nested.items()}
    return flat


def _words(name: str) -> str:
    return name.replace("_", " ")


def _numbers(rows: Mapping[str, str]) -> str:
    return markdown_table(["", ""], list(rows.items()), align=["left", "right"])


def _number(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
