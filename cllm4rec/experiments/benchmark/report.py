"""The report of a benchmark run: Markdown tables, printed and saved as report.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cllm4rec.experiments.benchmark.figures import Figures
from cllm4rec.reporting import markdown_table


def report(result: Figures) -> str:
    """All figures as Markdown tables. Parts that were not run are left out."""
    parts: tuple[tuple[str, str, Callable[[Figures], str]], ...] = (
        ("machine", "Machine", _machine),
        ("training", "Training", _training),
        ("scoring", "Scoring", _scoring),
        ("ray_overhead", "Overhead of Ray", _ray_overhead),
        ("growth", "Growth with users and items", _growth),
        ("startup", "Start-up", _startup),
    )
    lines = list(result.get("notes", []))
    for name, heading, table in parts:
        if name in result:
            lines += ["", f"### {heading}", "", table(result[name])]
    return "\n".join(lines).strip() + "\n"


def _machine(figures: Figures) -> str:
    return markdown_table(
        ("quantity", "median", "spread"),
        [
            ("fp32 matrix products, GFLOP/s", *_figure(figures, "fp32_flops_per_s", 1e9)),
            ("bf16 matrix products, GFLOP/s", *_figure(figures, "bf16_flops_per_s", 1e9)),
            ("memory copy, GB/s", *_figure(figures, "copy_bytes_per_s", 1e9)),
            ("threads", str(figures["threads"]), ""),
        ],
    )


def _training(by_kind: Figures) -> str:
    head = ("documents", "users/s", "documents/s", "tokens/s", "useful GFLOP/s", "utilization, %", "× reference")
    names = (("users_per_s", 1.0), ("documents_per_s", 1.0), ("tokens_per_s", 1.0), ("useful_flops_per_s", 1e9))
    return markdown_table(
        head,
        [
            (kind, *(_with_spread(figures, *name) for name in names), *_shares(figures))
            for kind, figures in by_kind.items()
        ],
    )


def _scoring(figures: Figures) -> str:
    names = (("users_per_s", 1.0), ("tokens_per_s", 1.0), ("useful_flops_per_s", 1e9))
    return markdown_table(
        ("users/s", "tokens/s", "useful GFLOP/s", "utilization, %", "× reference"),
        [(*(_with_spread(figures, *name) for name in names), *_shares(figures))],
    )


def _ray_overhead(figures: Figures) -> str:
    return markdown_table(
        ("part", "without Ray, s", "with Ray, s", "overhead, share of the time with Ray"),
        [
            (
                part,
                *(_with_spread(figures, f"{part}_{side}_s", 1.0, 1) for side in ("bare", "ray")),
                f"{figures[f'{part}_lost']:.1%}",
            )
            for part in ("training", "scoring")
        ],
    )


def _growth(figures: Figures) -> str:
    tables = []
    for axis in ("users", "items"):
        rows = figures.get(axis, [])
        if rows:
            names = list(rows[-1])  # the first size lacks the cost of additional users
            tables.append(markdown_table(names, [[_short(row.get(name, "–")) for name in names] for row in rows]))
    return "\n\n".join(tables)


def _startup(figures: Figures) -> str:
    names = [name for name in figures if name != "spread"]
    return markdown_table(
        ("program", "median, s", "spread"), [(name, *_figure(figures, name, 1.0, 2)) for name in names]
    )


def _shares(figures: Figures) -> tuple[str, str]:
    times = figures.get("vs_reference")
    return _with_spread(figures, "flops_share", 0.01), "" if times is None else f"{times:.1f}"


def _figure(figures: Figures, name: str, unit: float, digits: int = 0) -> tuple[str, str]:
    low, high = figures["spread"][name]
    return f"{figures[name] / unit:,.{digits}f}", f"{low / unit:,.{digits}f} to {high / unit:,.{digits}f}"


def _with_spread(figures: Figures, name: str, unit: float, digits: int = 0) -> str:
    median, spread = _figure(figures, name, unit, digits)
    return f"{median} ({spread})"


def _short(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
