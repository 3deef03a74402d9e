"""Ranking metrics on whole arrays: plain functions, no model, no files.

Shapes: B users, J items, K places of a ranked list. A ranked list holds distinct item indices, best first; -1 marks an
empty place and never hits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.typing import Array, BoolArray, FloatArray, IntArray

METRICS = ("recall@20", "recall@40", "ndcg@100")
"""The metrics of the paper. Functions take any tuple of names, such as ("recall@10", "ndcg@10")."""


def recall_at(ranked_BK: Array, relevant: Ragged, k: int) -> FloatArray:
    """Hits among the first k divided by min(k, number of relevant items), for each user (docs/method.md, Data and measure).

    The missing places of a list shorter than k count as misses. `relevant` has one row of distinct items per user.
    Raises ValueError if a user has none.
    """
    num_hits_B = hits(ranked_BK[:, :k], relevant).sum(axis=1)
    return np.asarray(num_hits_B / np.minimum(_counted(relevant), k))


def ndcg_at(ranked_BK: Array, relevant: Ragged, k: int) -> FloatArray:
    """Discounted gain of the first k with binary relevance, divided by that of an ideal list; otherwise like `recall_at`."""
    discount_K = 1.0 / np.log2(np.arange(2, k + 2))
    hit_BK = hits(ranked_BK[:, :k], relevant)
    ideal_B = np.cumsum(discount_K)[np.minimum(_counted(relevant), k) - 1]
    return np.asarray(hit_BK @ discount_K[: hit_BK.shape[1]] / ideal_B)


FUNCTIONS: dict[str, Callable[[Array, Ragged, int], FloatArray]] = {"recall": recall_at, "ndcg": ndcg_at}


def compute(ranked_BK: Array, relevant: Ragged, metrics: Sequence[str] = METRICS) -> dict[str, FloatArray]:
    """Every metric for every user, by name. Raises ValueError for a name that is not `recall@k` or `ndcg@k`."""
    parsed = {name: parse_metric(name) for name in metrics}
    return {name: FUNCTIONS[function](ranked_BK, relevant, k) for name, (function, k) in parsed.items()}


def depth(metrics: Sequence[str] = METRICS) -> int:
    """The length of ranked lists that these metrics need."""
    return max(parse_metric(name)[1] for name in metrics)


def parse_metric(name: str) -> tuple[str, int]:
    """`recall@20` → ("recall", 20)."""
    function, _, k = name.partition("@")
    if function not in FUNCTIONS or not k.isdecimal() or int(k) < 1:
        raise ValueError(
            f"there is no metric {name!r}; use {' or '.join(f'{known}@k' for known in FUNCTIONS)} with k of 1 or more"
        )
    return function, int(k)


def hits(ranked_BK: Array, items: Ragged) -> BoolArray:
    """For each place of each list, whether it holds one of the user's `items`."""
    ranked_BK = np.asarray(ranked_BK, np.int64)
    if not items.values.size or not ranked_BK.size:
        return np.zeros(ranked_BK.shape, np.bool_)
    # (user, item) as one integer: membership becomes a search in one sorted array, without a loop over users.
    stride = int(max(ranked_BK.max(), items.values.max())) + 1
    keys = np.sort(items.keys(stride))
    wanted_BK = np.arange(len(ranked_BK))[:, None] * stride + ranked_BK
    found_BK = keys[np.minimum(np.searchsorted(keys, wanted_BK), len(keys) - 1)] == wanted_BK
    return np.asarray(found_BK & (ranked_BK >= 0))


def rank_scores(score_BJ: Array, seen: Ragged, k: int) -> tuple[IntArray, Array]:
    """Ranked lists (item_BK, score_BK) from dense scores: descending, without `seen`, equal scores by lower item index.

    Empty places hold -1 and -inf; an item with the score -inf is never ranked. The dtype of the scores is kept. Raises
    ValueError if a score is NaN.
    """
    if np.isnan(score_BJ).any():
        raise ValueError("scores hold NaN, which has no rank; look for a diverged model")
    score_BJ = score_BJ.copy()
    score_BJ[seen.rows, seen.values] = -np.inf
    num_items = score_BJ.shape[1]
    width = min(k, num_items)
    item_BK = _best_by_index(score_BJ, width)
    best_BK = np.take_along_axis(score_BJ, item_BK, 1)
    # The items are in index order, so a stable sort puts the lower index of equal scores first.
    order_BK = np.argsort(-best_BK, axis=1, kind="stable")
    item_BK, best_BK = np.take_along_axis(item_BK, order_BK, 1), np.take_along_axis(best_BK, order_BK, 1)
    item_BK = np.where(best_BK == -np.inf, -1, item_BK)
    return _filled(item_BK, k, -1), _filled(best_BK, k, -np.inf)


def _best_by_index(score_BJ: Array, k: int) -> IntArray:
    """The k best items of each row, in index order. A partition alone would pick any of the items tied at the k-th place."""
    num_users, num_items = score_BJ.shape
    if k == 0:
        return np.empty((num_users, 0), np.int64)
    last_B1 = np.partition(score_BJ, num_items - k, axis=1)[:, num_items - k, None]
    above_BJ, tied_BJ = score_BJ > last_B1, score_BJ == last_B1
    places_left_B1 = k - above_BJ.sum(axis=1, keepdims=True)
    chosen_BJ = above_BJ | (tied_BJ & (np.cumsum(tied_BJ, axis=1) <= places_left_B1))
    return np.nonzero(chosen_BJ)[1].reshape(num_users, k).astype(np.int64)


def _filled(values_BK: Array, k: int, filler: float) -> Array:
    return np.pad(values_BK, ((0, 0), (0, k - values_BK.shape[1])), constant_values=filler)


def _counted(relevant: Ragged) -> IntArray:
    counts = relevant.lengths
    if (counts == 0).any():
        raise ValueError(
            f"{int((counts == 0).sum())} users have no relevant item and so no metric; leave them out first"
        )
    return counts
