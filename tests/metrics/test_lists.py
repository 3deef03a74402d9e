"""Coverage and popularity lift on lists that can be counted by hand."""

import numpy as np
import pytest

from cllm4rec.metrics.lists import coverage, num_distinct, popularity_lift


def test_coverage_counts_each_item_once():
    assert num_distinct(np.array([0, 1, 2, 0, 3])) == 4
    assert coverage(np.array([0, 1, 2, 0, 3]), 10) == 0.4
    assert coverage(np.empty(0, np.int64), 10) == 0


def test_the_popularity_lift_of_a_list_of_the_whole_catalog_is_one():
    count_J = np.array([8, 4, 0, 0])
    assert popularity_lift(count_J, count_J) == 1.0
    assert popularity_lift(count_J[[0]], count_J) == pytest.approx(8 / 3)


def test_without_recommendations_or_interactions_there_is_no_lift():
    assert popularity_lift(np.empty(0), np.array([8, 4])) == 0
    assert popularity_lift(np.zeros(3), np.zeros(2)) == popularity_lift(np.zeros(3), np.empty(0)) == 0
