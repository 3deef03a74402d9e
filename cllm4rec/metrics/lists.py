"""Properties of recommendation lists other than accuracy: how much of the catalog they show, and how popular it is.

Lengths: E entries of all lists (without empty places), J items of the catalog.
"""

from __future__ import annotations

import numpy as np

from cllm4rec.typing import Array, IntArray


def num_distinct(item_E: IntArray) -> int:
    """How many different items occur in the lists: their coverage, as a count."""
    return len(np.unique(item_E))


def coverage(item_E: IntArray, num_items: int) -> float:
    """The share of a catalog of `num_items` that occurs in at least one list."""
    return num_distinct(item_E) / num_items


def popularity_lift(count_E: Array, count_J: Array) -> float:
    """Mean training interactions of a recommended item (`count_E`) divided by the mean of the catalog (`count_J`).

    Lists of random items have a lift of 1; without recommendations or interactions it is 0.
    """
    catalog_mean = float(np.mean(count_J)) if len(count_J) else 0.0
    return float(np.mean(count_E)) / catalog_mean if len(count_E) and catalog_mean > 0 else 0.0
