"""Metrics and ranking against slow, obvious references and against ranx."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.metrics.ranking import METRICS, compute, depth, hits, ndcg_at, rank_scores, recall_at

NUM_ITEMS = 30


def slow_recall(ranked: list[int], relevant: set[int], k: int) -> float:
    return sum(item in relevant for item in ranked[:k]) / min(k, len(relevant))


def slow_ndcg(ranked: list[int], relevant: set[int], k: int) -> float:
    gained = sum(1 / math.log2(place + 2) for place, item in enumerate(ranked[:k]) if item in relevant)
    return gained / sum(1 / math.log2(place + 2) for place in range(min(k, len(relevant))))


def slow_rank(scores: list[float], seen: set[int], k: int) -> list[int]:
    allowed = [item for item in range(len(scores)) if item not in seen]
    return (sorted(allowed, key=lambda item: (-scores[item], item)) + [-1] * k)[:k]


@st.composite
def rankings(draw: st.DrawFn) -> tuple[np.ndarray, list[list[int]]]:
    """Lists of 12 places, some with padding at the end, and what each user should find."""
    num_users = draw(st.integers(1, 6))
    lists = [draw(st.permutations(range(NUM_ITEMS)))[: draw(st.integers(0, 12))] for _ in range(num_users)]
    ranked_BK = np.array([items + [-1] * (12 - len(items)) for items in lists], np.int64)
    wanted = st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=20, unique=True)
    return ranked_BK, [draw(wanted) for _ in range(num_users)]


@settings(max_examples=200, deadline=None)
@given(rankings(), st.integers(1, 15))
def test_metrics_equal_the_slow_reference(case: tuple[np.ndarray, list[list[int]]], k: int) -> None:
    ranked_BK, wanted = case
    relevant = Ragged.from_lists(wanted)
    for fast, slow in ((recall_at, slow_recall), (ndcg_at, slow_ndcg)):
        expected = [slow(ranked_BK[row].tolist(), set(wanted[row]), k) for row in range(len(wanted))]
        np.testing.assert_allclose(fast(ranked_BK, relevant, k), expected, rtol=1e-12)


def test_metrics_equal_those_of_ranx() -> None:
    ranx = pytest.importorskip("ranx")
    generator = np.random.default_rng(0)
    ranked_BK = np.argsort(generator.random((50, 400)), axis=1)[:, :100]
    wanted = [generator.choice(400, generator.integers(1, 20), replace=False) for _ in range(50)]
    qrels = ranx.Qrels({f"u{row}": {f"i{item}": 1 for item in items} for row, items in enumerate(wanted)})
    run = ranx.Run(
        {
            f"u{row}": {f"i{item}": 100.0 - place for place, item in enumerate(items)}
            for row, items in enumerate(ranked_BK)
        }
    )
    # ranx divides recall by all relevant items; with fewer than k of them that is the same number.
    theirs = ranx.evaluate(qrels, run, list(METRICS), return_mean=False, make_comparable=False)
    ours = compute(ranked_BK, Ragged.from_lists(wanted))
    order = [int(name[1:]) for name in qrels.qrels]
    for name in METRICS:
        np.testing.assert_allclose(ours[name][order], theirs[name], rtol=1e-9)


def test_recall_divides_by_k_where_more_items_are_relevant() -> None:
    ranked_BK = np.array([[0, 1]])
    assert recall_at(ranked_BK, Ragged.from_lists([[0, 5, 6, 7, 8]]), 2) == pytest.approx([0.5])


def test_padding_never_hits_the_last_item_of_the_user_before() -> None:
    ranked_BK = np.array([[0, 1], [-1, -1]])
    assert not hits(ranked_BK, Ragged.from_lists([[1], [0]]))[1].any()


def test_a_user_without_relevant_items_is_refused() -> None:
    with pytest.raises(ValueError, match="1 users have no relevant item"):
        compute(np.zeros((2, 1), np.int64), Ragged.from_lists([[0], []]))


@pytest.mark.parametrize("name", ["precision@10", "recall@0", "recall", "recall@-1"])
def test_an_unknown_metric_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        compute(np.zeros((1, 1), np.int64), Ragged.from_lists([[0]]), [name])


def test_another_set_of_metrics_is_a_tuple_of_names() -> None:
    per_user = compute(np.array([[3, 4]]), Ragged.from_lists([[4]]), ("recall@10", "ndcg@1"))
    assert {name: values.tolist() for name, values in per_user.items()} == {"recall@10": [1.0], "ndcg@1": [0.0]}
    assert depth(("recall@10", "ndcg@1")) == 10


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_ranked_scores_equal_a_stable_sort_however_many_tie(data: st.DataObject) -> None:
    num_users, num_items, k = (data.draw(st.integers(1, high)) for high in (5, 25, 30))
    # Few distinct values, so that ties fall on the k-th place; -0.0 and 0.0 are the same score.
    values = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 1e30])
    scores = [data.draw(st.lists(values, min_size=num_items, max_size=num_items)) for _ in range(num_users)]
    seen = [data.draw(st.lists(st.integers(0, num_items - 1), unique=True)) for _ in range(num_users)]
    score_BJ = np.array(scores, np.float32)
    item_BK, best_BK = rank_scores(score_BJ, Ragged.from_lists(seen), k)
    assert item_BK.tolist() == [slow_rank(row, set(out), k) for row, out in zip(score_BJ.tolist(), seen, strict=True)]
    placed = np.take_along_axis(score_BJ, np.maximum(item_BK, 0), 1)
    np.testing.assert_array_equal(best_BK, np.where(item_BK >= 0, placed, -np.inf))


def test_ranking_leaves_the_scores_as_they_were() -> None:
    score_BJ = np.ones((1, 3))
    rank_scores(score_BJ, Ragged.from_lists([[0]]), 2)
    assert (score_BJ == 1).all()


def test_an_item_scored_minus_infinity_is_not_ranked() -> None:
    item_BK, _ = rank_scores(np.array([[-np.inf, 2.0]]), Ragged.from_lists([[]]), 2)
    assert item_BK.tolist() == [[1, -1]]


def test_scores_that_are_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        rank_scores(np.array([[0.0, np.nan]]), Ragged.from_lists([[]]), 1)
