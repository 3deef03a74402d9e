"""The evaluation protocol: who is evaluated, what is read and masked, and the intervals."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from scipy import sparse

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import EvaluateConfig
from cllm4rec.errors import ConfigError
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.evaluation.popularity import Popularity
from cllm4rec.metrics import protocol
from cllm4rec.metrics.protocol import (
    HeldOut,
    Validation,
    bootstrap_interval,
    history_strata,
    interaction_matrix,
    means,
    popularity_strata,
    rank_with,
    summarize,
)
from cllm4rec.metrics.ranking import compute

HISTORIES = Histories(
    user=np.array([0, 1, 2]),
    train=Ragged.from_lists([[0, 1], [2], [3, 4, 5]]),
    validation=Ragged.from_lists([[2], [], [0]]),
    test=Ragged.from_lists([[3], [0, 1], []]),
)


def random_histories(num_users: int = 60, num_items: int = 40, seed: int = 0) -> Histories:
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(num_items)[: generator.integers(6, 14)] for _ in range(num_users)]
    cut = [Ragged.from_lists([order[part] for order in orders]) for part in (slice(4, None), slice(0, 2), slice(2, 4))]
    return Histories(np.arange(num_users), *cut)


def test_users_without_test_items_are_dropped_and_counted() -> None:
    held_out = HeldOut.test(HISTORIES)
    assert (held_out.users.tolist(), held_out.num_dropped) == ([0, 1], 1)
    assert held_out.relevant.tolist() == [[3], [0, 1]]
    assert held_out.num_train.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("read", "mask", "read_items", "masked_items"),
    [
        ("train", "train+validation", [[0, 1], [2]], [[0, 1, 2], [2]]),
        ("train", "train", [[0, 1], [2]], [[0, 1], [2]]),
        ("train+validation", "train+validation", [[0, 1, 2], [2]], [[0, 1, 2], [2]]),
    ],
)
def test_the_policy_says_what_is_read_and_what_is_masked(
    read: str, mask: str, read_items: list[list[int]], masked_items: list[list[int]]
) -> None:
    held_out = HeldOut.test(HISTORIES, read, mask)
    assert (held_out.read.tolist(), held_out.masked.tolist()) == (read_items, masked_items)


def test_reading_what_may_be_recommended_is_refused() -> None:
    with pytest.raises((ConfigError, ValueError), match="would recommend what was just read"):
        EvaluateConfig(read="train+validation", mask="train")


def test_validation_reads_training_items_and_wants_validation_items() -> None:
    validation = Validation(HISTORIES)
    assert validation.users.tolist() == [0, 2]
    assert validation.read.tolist() == [[0, 1], [3, 4, 5]]
    assert validation.relevant.tolist() == [[2], [0]]


def test_sums_of_shards_add_up_to_the_whole() -> None:
    histories = random_histories()
    shards = [Validation(histories.take(np.arange(rank, 60, 2))) for rank in range(2)]
    ranked_IK = np.argsort(np.random.default_rng(1).random((60, 40)), axis=1)[:, :30]
    sums = [pickle.loads(pickle.dumps(shard)).metrics(ranked_IK[shard.users]) for shard in shards]
    total = {name: sums[0][name] + sums[1][name] for name in sums[0]}
    expected = {name: values.mean() for name, values in compute(ranked_IK, histories.validation).items()}
    assert means(total) == pytest.approx(expected)


def test_a_shard_without_validation_users_adds_nothing() -> None:
    empty = Validation(HISTORIES.take(np.array([1]))).metrics(np.empty((0, 5), np.int64))
    assert set(empty.values()) == {0.0}
    assert math.isnan(means(empty)["recall@20"])


def test_the_interval_is_that_of_the_normal_theory_for_many_users() -> None:
    values_B = np.random.default_rng(0).exponential(size=4000)
    low, high = bootstrap_interval(values_B, 2000, seed=1)
    half = 1.96 * values_B.std() / math.sqrt(4000)
    assert low == pytest.approx(values_B.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values_B.mean() + half, abs=0.1 * half)


def test_the_interval_does_not_depend_on_the_memory_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    values_B = np.random.default_rng(0).random(101)
    at_once = bootstrap_interval(values_B, 250, seed=3)
    monkeypatch.setattr(protocol, "CHUNK_VALUES", 700)
    assert bootstrap_interval(values_B, 250, seed=3) == at_once
    assert bootstrap_interval(values_B, 250, seed=4) != at_once


def test_a_summary_holds_the_mean_inside_its_interval() -> None:
    summary = summarize({"recall@20": np.array([0.0, 0.0, 1.0, 0.5] * 20)}, 200, seed=0)["recall@20"]
    assert summary["low"] < summary["mean"] == 0.375 < summary["high"]


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval(np.empty(0), 10, seed=0)


def test_baselines_are_ranked_the_same_in_chunks_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    histories = random_histories()
    popularity = Popularity().fit(TrainingData(40, histories.train, Validation(histories), [], []))
    masked = histories.together("train", "validation")
    at_once = rank_with(popularity, histories.user, histories.train, masked, 40, 50)
    monkeypatch.setattr(protocol, "CHUNK_VALUES", 40 * 7)
    np.testing.assert_array_equal(rank_with(popularity, histories.user, histories.train, masked, 40, 50), at_once)
    assert at_once.shape == (60, 50)
    assert all(not set(row) & set(out) for row, out in zip(at_once.tolist(), masked.tolist(), strict=True))


def test_the_interaction_matrix_has_a_one_for_every_item() -> None:
    matrix = interaction_matrix(Ragged.from_lists([[2, 0], [], [1]]), 4)
    assert sparse.issparse(matrix)
    assert matrix.toarray().tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]


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
