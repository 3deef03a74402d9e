"""The evaluation protocol: which users are evaluated, what is read, and what is masked."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from scipy import sparse
from support.histories import random_histories

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
    interaction_matrix,
    means,
    rank_with,
)
from cllm4rec.metrics.ranking import compute

HISTORIES = Histories(
    user=np.array([0, 1, 2]),
    train=Ragged.from_lists([[0, 1], [2], [3, 4, 5]]),
    validation=Ragged.from_lists([[2], [], [0]]),
    test=Ragged.from_lists([[3], [0, 1], []]),
)


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
    with pytest.raises((ConfigError, ValueError), match="would recommend items that were just read"):
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
