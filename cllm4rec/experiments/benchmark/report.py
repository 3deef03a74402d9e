"""The table of a benchmark run, printed and saved as report.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cllm4rec.experiments.benchmark.figures import Row
from cllm4rec.reporting import markdown_table


def report(told: Row) -> str:
    """Everything measured as Markdown tables; parts that were not run are left out."""
    parts: tuple[tuple[str, Callable[[Row], str]], ...] = (
        ("machine", _machine),
        ("training", _training),
        ("scoring", _scoring),
        ("ray_overhead", _rim),
        ("growth", _growth),
        ("startup", _startup),
    )
    lines = [f"{note}" for note in told.get("notes", [])]
    for name, table in parts:
        if name in told:
            lines += ["", f"### {name}", "", table(told[name])]
    return "\n".join(lines).strip() + "\n"


def _machine(row: Row) -> str:
    return markdown_table(
        ("what", "median", "spread"),
        [
            ("fp32 matrix products, GFLOP/s", *_figure(row, "fp32_flops_per_s", 1e9)),
            ("bf16 matrix products, GFLOP/s", *_figure(row, "bf16_flops_per_s", 1e9)),
            ("memory copy, GB/s", *_figure(row, "copy_bytes_per_s", 1e9)),
            ("threads", str(row["threads"]), ""),
        ],
    )


def _training(rows: Row) -> str:
    head = ("documents", "users/s", "documents/s", "tokens/s", "useful GFLOP/s", "% of the rate", "× reference")
    names = (("users_per_s", 1.0), ("documents_per_s", 1.0), ("tokens_per_s", 1.0), ("useful_flops_per_s", 1e9))
    return markdown_table(
        head, [(kind, *(_with_spread(row, *name) for name in names), *_shares(row)) for kind, row in rows.items()]
    )


def _scoring(row: Row) -> str:
    names = (("users_per_s", 1.0), ("tokens_per_s", 1.0), ("useful_flops_per_s", 1e9))
    return markdown_table(
        ("users/s", "tokens/s", "useful GFLOP/s", "% of the rate", "× reference"),
        [(*(_with_spread(row, *name) for name in names), *_shares(row))],
    )


def _rim(row: Row) -> str:
    return markdown_table(
        ("what", "bare, s", "through Ray, s", "lost"),
        [
            (
                part,
                *(_with_spread(row, f"{part}_{side}_s", 1.0, 1) for side in ("bare", "ray")),
                f"{row[f'{part}_lost']:.1%}",
            )
            for part in ("training", "scoring")
        ],
    )


def _growth(row: Row) -> str:
    tables = []
    for axis in ("users", "items"):
        rows = row.get(axis, [])
        if rows:
            names = list(rows[-1])  # the first size has no smaller one to compare with
            tables.append(markdown_table(names, [[_short(one.get(name, "–")) for name in names] for one in rows]))
    return "\n\n".join(tables)


def _startup(row: Row) -> str:
    names = [name for name in row if name != "spread"]
    return markdown_table(("what", "s", "spread"), [(name, *_figure(row, name, 1.0, 2)) for name in names])


def _shares(row: Row) -> tuple[str, str]:
    times = row.get("vs_reference")
    return _with_spread(row, "flops_share", 0.01), "" if times is None else f"{times:.1f}"


def _figure(row: Row, name: str, unit: float, digits: int = 0) -> tuple[str, str]:
    low, high = row["spread"][name]
    return f"{row[name] / unit:,.{digits}f}", f"{low / unit:,.{digits}f} to {high / unit:,.{digits}f}"


def _with_spread(row: Row, name: str, unit: float, digits: int = 0) -> str:
    median, spread = _figure(row, name, unit, digits)
    return f"{median} ({spread})"


def _short(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
