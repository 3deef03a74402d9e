"""Drift between two tables of lists: users that disappeared, lists that changed, which items are recommended, scores.

    old = sample(old_tables, most, num_users); new = sample(new_tables, most, num_users)
    drift = compare(old, new, (catalog.item_ids, catalog.item_counts))
    for sentence in breaches(drift, config.nightly.drift): ...

Pure functions on Arrow tables with the columns user_id, item_ids and scores. Lengths: U users of a table, E entries of
all its lists, J distinct items.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure

from cllm4rec.arrays.ids import IdMap
from cllm4rec.arrays.ragged import Ragged, offsets_of
from cllm4rec.config import DriftLimits
from cllm4rec.metrics.lists import num_distinct, popularity_lift
from cllm4rec.reporting import INK, plain, png
from cllm4rec.storage.files import read_tables
from cllm4rec.typing import Array, FloatArray, IntArray

Popularity = tuple[Sequence[str] | Array, Sequence[int] | Array]
"""The item ids of the catalog, and the number of training interactions of each."""

COLUMNS = ("user_id", "item_ids", "scores")
TOP = 10
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Where `score_quantiles_old` and `_new` are taken: 0 is the lowest score and 1 the highest."""

_SCHEMA = pa.schema([("user_id", pa.string()), ("item_ids", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])
_OLD_COLOR, _NEW_COLOR = "#98a3ad", "#0b6e99"
_NUM_BINS = 60


@dataclasses.dataclass(frozen=True)
class Drift:
    """The differences between an old and a new table, measured on a sample of the users of each. Shares are from 0 to 1.

    users_gone: share of the old users who are not in the new table; users_added: share of the new ones who are not in
    the old. top10_changed, top10_overlap: over users in both tables; the overlap of two lists is the number of common
    items divided by the length of the longer list (1 if no user is in both tables). coverage: number of distinct items in
    all lists. lift: popularity lift, see `metrics.lists`; an item outside the catalog has 0 interactions. score_shift: the
    Kolmogorov-Smirnov distance between the scores, which is the largest difference between the shares of scores below any
    one value; 0 if a table is empty.
    """

    old_users: int
    new_users: int
    users_compared: int
    users_gone: float
    users_added: float
    top10_changed: float
    top10_overlap: float
    coverage_old: int
    coverage_new: int
    lift_old: float
    lift_new: float
    score_shift: float
    score_quantiles_old: tuple[float, ...]
    score_quantiles_new: tuple[float, ...]

    @property
    def coverage_drop(self) -> float:
        """The share of the old coverage that is lost; 0 if it grew."""
        return max(0.0, _share_lost(self.coverage_old, self.coverage_new))

    @property
    def lift_ratio(self) -> float:
        """The factor by which the lift grew or shrank: 1 or more, infinite if one of the two is 0."""
        low, high = sorted((self.lift_old, self.lift_new))
        if low == high:
            return 1.0
        return high / low if low else math.inf


def sample(tables: Iterable[pa.Table], most: int, num_users: int) -> pa.Table:
    """The rows (user_id, item_ids, scores) of about `most` of `num_users` users, or of all if there are no more.

    The choice depends on the user id, `most` and `num_users` alone, so the same numbers select the same users in another
    table. Memory: one of the tables and the selected rows.
    """
    kept = [_of_sampled_users(table, most, num_users).cast(_SCHEMA) for table in tables]
    return pa.concat_tables([_SCHEMA.empty_table(), *kept])


def sample_file(file: str, most: int, num_users: int) -> pa.Table:
    """`sample` of one Parquet file. The samples of all files of a table add up to the sample of the table."""
    return sample([read_tables([file], list(COLUMNS))], most, num_users)


def compare(old: pa.Table, new: pa.Table, popularity: Popularity) -> Drift:
    """The drift between two tables with one row per user; `popularity` belongs to the current catalog."""
    old_rows, new_rows = _shared_rows(old, new)
    items, (old_codes_E, new_codes_E) = _item_codes(old, new)
    counts_J = _counts_of(items, popularity)
    catalog_counts = np.asarray(popularity[1])
    overlap_U = _top_overlap(
        Ragged(old_codes_E, _offsets(old)).take(old_rows), Ragged(new_codes_E, _offsets(new)).take(new_rows)
    )
    old_scores_E, new_scores_E = _scores(old), _scores(new)
    return Drift(
        old_users=len(old),
        new_users=len(new),
        users_compared=len(old_rows),
        users_gone=_share_lost(len(old), len(old_rows)),
        users_added=_share_lost(len(new), len(new_rows)),
        top10_changed=float((overlap_U < 1).mean()) if len(overlap_U) else 0.0,
        top10_overlap=float(overlap_U.mean()) if len(overlap_U) else 1.0,
        coverage_old=num_distinct(old_codes_E),
        coverage_new=num_distinct(new_codes_E),
        lift_old=popularity_lift(counts_J[old_codes_E], catalog_counts),
        lift_new=popularity_lift(counts_J[new_codes_E], catalog_counts),
        score_shift=_ks_distance(old_scores_E, new_scores_E),
        score_quantiles_old=_quantiles(old_scores_E),
        score_quantiles_new=_quantiles(new_scores_E),
    )


def breaches(drift: Drift, limits: DriftLimits) -> list[str]:
    """One sentence per exceeded limit, with the value, the limit and the setting."""
    users = f"of {drift.users_compared:,} users in both tables"
    items = f"({drift.coverage_old:,} distinct items before, {drift.coverage_new:,} now)"
    lifts = f"(from {drift.lift_old:.3g} to {drift.lift_new:.3g})"
    checks: tuple[tuple[float, str, Callable[[float], str], str], ...] = (
        (
            drift.users_gone,
            "max_users_gone",
            _percent,
            f"of the last table's users are missing in the new table ({drift.old_users:,} were sampled)",
        ),
        (drift.top10_changed, "max_top10_changed", _percent, f"{users} have other items in their top ten"),
        (drift.coverage_drop, "max_coverage_drop", _percent, f"of the coverage is lost {items}"),
        (drift.lift_ratio, "max_lift_ratio", _factor, f"is the factor by which the popularity lift changed {lifts}"),
        (
            drift.score_shift,
            "max_score_shift",
            _number,
            "is the Kolmogorov-Smirnov distance between the old and the new scores",
        ),
    )
    return [
        f"{show(value)} {what}; the limit nightly.drift.{setting} is {show(getattr(limits, setting))}."
        for value, setting, show, what in checks
        if value > getattr(limits, setting)
    ]


def render(drift: Drift, old: pa.Table, new: pa.Table) -> dict[str, bytes]:
    """PNG files by name: the distributions of the scores, and the recommended items, old and new."""
    return {"drift_scores.png": png(_plot_scores(drift, old, new)), "drift_items.png": png(_plot_items(drift))}


def _of_sampled_users(table: pa.Table, most: int, num_users: int) -> pa.Table:
    table = table.select(COLUMNS)
    if num_users <= most:
        return table
    user_ids = table["user_id"].to_numpy(zero_copy_only=False).astype(object)
    # A hash of the id, not a row number: every night the rows are in another order.
    hash_U = pd.util.hash_array(user_ids, categorize=False)
    return table.filter(pa.array(hash_U < np.uint64(most / num_users * 2**64)))


def _share_lost(before: int, left: int) -> float:
    # Not 1 - left / before: its rounding could push a share that is just allowed over the limit.
    return (before - left) / before if before else 0.0


def _shared_rows(old: pa.Table, new: pa.Table) -> tuple[IntArray, IntArray]:
    """The rows of the users in both tables, in the same order."""
    old_row = IdMap(old["user_id"])(new["user_id"])
    return old_row[old_row >= 0], np.flatnonzero(old_row >= 0)


def _item_codes(old: pa.Table, new: pa.Table) -> tuple[list[str], tuple[IntArray, IntArray]]:
    """The distinct items, and the index in them of every entry of both tables."""
    entries = [pc.list_flatten(table["item_ids"]).cast(pa.string()) for table in (old, new)]
    encoded = pa.chunked_array([chunk for column in entries for chunk in column.chunks], pa.string())
    encoded = encoded.dictionary_encode().unify_dictionaries()
    items = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
    codes_E = np.concatenate([np.empty(0, np.int64), *(np.asarray(chunk.indices) for chunk in encoded.chunks)])
    old_E, new_E = np.split(codes_E.astype(np.int64), [len(entries[0])])
    return items, (old_E, new_E)


def _offsets(table: pa.Table) -> IntArray:
    return offsets_of(pc.list_value_length(table["item_ids"]).to_numpy())


def _scores(table: pa.Table) -> FloatArray:
    return np.sort(pc.list_flatten(table["scores"]).to_numpy().astype(np.float64))


def _counts_of(items: list[str], popularity: Popularity) -> FloatArray:
    item_ids, counts = popularity
    row_J = IdMap(item_ids)(items)
    return np.append(np.asarray(counts, np.float64), 0.0)[row_J]  # row -1, of an unknown item, is the 0 at the end


def _top_overlap(old: Ragged, new: Ragged) -> FloatArray:
    """For every row, the share of the first ten entries that both lists have."""
    old, new = (lists.where(lists.places < TOP).unique() for lists in (old, new))
    longer = np.maximum(old.lengths, new.lengths)
    common = np.bincount(old.rows[old.isin(new)], minlength=len(old))
    return np.where(longer > 0, common / np.maximum(longer, 1), 1.0)


def _ks_distance(old_E: FloatArray, new_E: FloatArray) -> float:
    """Kolmogorov-Smirnov distance of two sorted arrays. scipy's ks_2samp also computes a p value, which takes long."""
    if not len(old_E) or not len(new_E):
        return 0.0
    values = np.concatenate([old_E, new_E])
    below_old, below_new = (
        np.searchsorted(scores_E, values, side="right") / len(scores_E) for scores_E in (old_E, new_E)
    )
    return float(np.abs(below_old - below_new).max())


def _quantiles(scores_E: FloatArray) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(scores_E, QUANTILES)) if len(scores_E) else ()


def _percent(value: float) -> str:
    return f"{value:.2%}"


def _factor(value: float) -> str:
    return f"{value:.3g}"


def _number(value: float) -> str:
    return f"{value:.3f}"


def _plot_scores(drift: Drift, old: pa.Table, new: pa.Table) -> Figure:
    """Both histograms over the same bins, each as shares of its own table."""
    scores = {"last table": _scores(old), "new table": _scores(new)}
    together = np.concatenate([*scores.values(), np.empty(0)])
    # The outermost thousandth on each side would compress the rest into a few bins.
    low, high = np.quantile(together, [0.001, 0.999]) if len(together) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, _NUM_BINS + 1)
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, scores_E), color in zip(scores.items(), (_OLD_COLOR, _NEW_COLOR), strict=True):
        share = np.histogram(scores_E, edges)[0] / max(len(scores_E), 1)
        axes.stairs(share, edges, fill=True, alpha=0.25, color=color)
        axes.stairs(share, edges, color=color, linewidth=1.6, label=name)
    axes.set_xlabel("score of a recommended item", color=INK)
    axes.set_ylabel("share of the table's scores", color=INK)
    axes.set_title(f"Kolmogorov-Smirnov distance {drift.score_shift:.3f}", fontsize=11, color=INK)
    plain(axes, "y")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _plot_items(drift: Drift) -> Figure:
    """Coverage and lift, old and new, and the shares of users that differ."""
    panels: tuple[tuple[str, dict[str, float], str], ...] = (
        ("Distinct items", {"last": drift.coverage_old, "new": drift.coverage_new}, "{:,.0f}"),
        ("Popularity lift", {"last": drift.lift_old, "new": drift.lift_new}, "{:.2f}"),
        (
            "Users",
            {"missing": drift.users_gone, "added": drift.users_added, "other\ntop 10": drift.top10_changed},
            "{:.1%}",
        ),
    )
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (title, values, shown) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        colors = [_OLD_COLOR, _NEW_COLOR] if "last" in values else [_NEW_COLOR] * len(values)
        bars = axes.bar(list(values), list(values.values()), color=colors, width=0.55)
        axes.bar_label(bars, [shown.format(value) for value in values.values()], padding=2, fontsize=9, color=INK)
        axes.set_title(title, fontsize=11, color=INK)
        axes.set_xlim(-0.6, len(values) - 0.4)
        axes.set_ylim(0, 1.15 * max(values.values()) or 1.0)
        axes.yaxis.set_major_formatter(lambda value, _, shown=shown: shown.format(value))
        plain(axes, "y")
    return figure
