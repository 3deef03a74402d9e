"""Parts of the held-out users and items, so that a report can say where methods differ.

Shapes: B users, J items.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.metrics.protocol import HeldOut
from cllm4rec.typing import IntArray


@dataclasses.dataclass(frozen=True)
class Stratum:
    """Some users (`rows` of a HeldOut), the relevant items that count for them, and a label for reports."""

    label: str
    rows: IntArray
    relevant: Ragged

    @classmethod
    def of(cls, label: str, relevant: Ragged) -> Self:
        """The users with at least one item in `relevant` (one row per user of the HeldOut)."""
        rows = np.flatnonzero(relevant.lengths)
        return cls(label, rows, relevant.take(rows))


def history_strata(held_out: HeldOut, parts: int = 4) -> list[Stratum]:
    """Users by their number of training items, in up to `parts` groups of nearly equal size."""
    lengths = held_out.num_train
    edges = np.unique(np.quantile(lengths, np.arange(parts) / parts, method="lower"))
    part_B = np.searchsorted(edges, lengths, side="right") - 1
    groups = [np.flatnonzero(part_B == part) for part in range(len(edges))]
    return [Stratum(_range_label(lengths[rows]), rows, held_out.relevant.take(rows)) for rows in groups]


def popularity_strata(held_out: HeldOut, item_counts: IntArray) -> list[Stratum]:
    """Relevant items by popularity: head, middle and tail of the catalog each have a third of the interactions.

    A stratum without relevant items is omitted.
    """
    descending = np.argsort(-item_counts, kind="stable")
    taken_before = np.cumsum(item_counts[descending]) - item_counts[descending]
    part_J = np.empty(len(item_counts), np.int64)
    part_J[descending] = np.minimum(3 * taken_before // max(int(item_counts.sum()), 1), 2)
    relevant, sizes = held_out.relevant, np.bincount(part_J, minlength=3)
    strata = [
        Stratum.of(f"{name} ({size:,} items)", relevant.where(part_J[relevant.values] == part))
        for part, (name, size) in enumerate(zip(("head", "middle", "tail"), sizes, strict=True))
    ]
    return [stratum for stratum in strata if len(stratum.rows)]


def _range_label(lengths: IntArray) -> str:
    low, high = int(lengths.min()), int(lengths.max())
    return f"{low}" if low == high else f"{low} to {high}"
