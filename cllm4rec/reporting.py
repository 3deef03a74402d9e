"""What every report is made of: a table in Markdown, a quiet frame around a plot, a plot as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, PALE = "#2b2f33", "#e6e9eb"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plain(axes: Axes, along: str) -> None:
    """A quiet frame: grid lines along the measured axis only."""
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
