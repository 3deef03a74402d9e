"""The parts of every report: tables for a terminal and for Markdown, and the look of plots."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import DataRow, Line, TableFormat, tabulate  # type: ignore[import-untyped]

INK, PALE = "#2b2f33", "#e6e9eb"

_CELLS = DataRow("", "  ", "")
_TERMINAL = TableFormat(
    lineabove=None,
    linebelowheader=Line("", "─", "──", ""),
    linebetweenrows=None,
    linebelow=None,
    headerrow=_CELLS,
    datarow=_CELLS,
    padding=0,
    with_header_hide=None,
)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: left-aligned columns, a line below the header."""
    return str(tabulate(rows, header, _TERMINAL, disable_numparse=True, stralign="left"))


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], align: Sequence[Literal["left", "right"]] | None = None
) -> str:
    """A table in Markdown. `align` says how a program that renders it aligns each column."""
    # Without an alignment cells are not padded, so a long text in one row does not widen all others.
    return str(tabulate(rows, header, "pipe", disable_numparse=True, stralign=None, numalign=None, colalign=align))


def plain(axes: Axes, along: str) -> None:
    """A plain frame: grid lines along the measured axis only."""
    for side in ("top", "right", "left" if along == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x" if along == "x" else "y", color=PALE, linewidth=1)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_color(INK)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()
