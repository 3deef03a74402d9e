"""Strata: every user in one group by history length, every test item in one group by popularity."""

from __future__ import annotations

import numpy as np
from support.histories import random_histories

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.metrics.protocol import HeldOut
from cllm4rec.metrics.strata import history_strata, popularity_strata


def test_history_strata_share_out_the_users_by_length() -> None:
    held_out = HeldOut.test(random_histories(200))
    strata = history_strata(held_out)
    assert len(strata) == 4
    assert sorted(np.concatenate([stratum.rows for stratum in strata]).tolist()) == list(range(200))
    longest = [held_out.num_train[stratum.rows].max() for stratum in strata]
    shortest = [held_out.num_train[stratum.rows].min() for stratum in strata]
    assert all(before < after for before, after in zip(longest, shortest[1:], strict=False))
    assert strata[0].label == f"{shortest[0]} to {longest[0]}"


def test_users_of_one_length_are_one_stratum() -> None:
    histories = Histories(np.arange(5), *(Ragged.from_lists([[item]] * 5) for item in (0, 1, 2)))
    assert [stratum.label for stratum in history_strata(HeldOut.test(histories))] == ["1"]


def test_popularity_strata_share_out_the_test_items() -> None:
    histories = random_histories(200)
    counts = np.zeros(40, np.int64)
    counts[:11] = [40, 20, 20, 5, 5, 5, 5, 5, 5, 5, 5]
    held_out = HeldOut.test(histories)
    head, middle, tail = popularity_strata(held_out, counts)
    assert [stratum.label for stratum in (head, middle, tail)] == [
        "head (1 items)",
        "middle (2 items)",
        "tail (37 items)",
    ]
    assert set(head.relevant.values) == {0}
    assert set(middle.relevant.values) == {1, 2}
    parts = np.concatenate([stratum.relevant.values for stratum in (head, middle, tail)])
    assert sorted(parts) == sorted(held_out.relevant.values)
    assert all(held_out.relevant[row].tolist().count(0) == 1 for row in head.rows)
