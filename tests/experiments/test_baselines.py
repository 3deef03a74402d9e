"""One suite for all baselines, on a world whose answer is known."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from support.trainings import LEARNED, NEURAL, cold_world, fitted, parity_training, recall

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data import world as worlds
from cllm4rec.errors import DataError
from cllm4rec.evaluation.baseline import Budget
from cllm4rec.experiments.baselines.registry import BASELINES, make
from cllm4rec.metrics.protocol import rank_with

READ_ITEM_TEXT = ["ease_text", "md_cvae", "s3rec", "two_tower", "m6_retrieval", "cllm4rec_emb"]
UNTAUGHT: dict[str, dict[str, object]] = {
    "bert4rec": {"pretrain_epochs": 0},
    "s3rec": {"pretrain_epochs": 0},
    "no_lm": {"init": "noise"},
}
"""Settings with which a baseline starts without what pretraining or texts tell it."""
FIND_COLD_ITEMS = ["ease_text", "md_cvae", "two_tower", "m6_retrieval", "cllm4rec_emb"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", LEARNED)
def test_a_baseline_finds_the_hidden_item_of_the_parity_world(name: str) -> None:
    assert recall(fitted(name), worlds.parity_world().histories, 20, 1) == 1.0


def test_popularity_finds_the_hidden_item_by_chance_only() -> None:
    assert recall(fitted("popularity"), worlds.parity_world().histories, 20, 1) < 0.2


@pytest.mark.parametrize("name", NEURAL)
def test_a_neural_baseline_knows_nothing_before_it_is_trained(name: str) -> None:
    untrained = dataclasses.replace(parity_training(), budget=Budget(0, 60.0))
    params = UNTAUGHT.get(name, {})
    assert recall(make(name, **params).fit(untrained), worlds.parity_world().histories, 20, 1) < 0.9


@pytest.mark.parametrize("name", LEARNED)
def test_an_unknown_user_is_ranked_for_by_the_history_alone(name: str) -> None:
    histories = worlds.parity_world().histories
    nobody, known = np.full(len(histories.user), -1), histories.together("train", "validation")
    item_BK = rank_with(fitted(name), nobody, histories.train, known, 20, 1)
    assert (item_BK[:, 0] == histories.test.values).mean() == 1.0


@pytest.mark.parametrize("name", BASELINES)
def test_scores_are_finite_numbers_of_single_precision_also_without_a_history(name: str) -> None:
    score_BJ = fitted(name).scores(np.array([0, -1]), Ragged.from_lists([[], []]))
    assert score_BJ.shape == (2, 20)
    assert score_BJ.dtype == np.float32
    assert np.isfinite(score_BJ).all()


@pytest.mark.parametrize("name", LEARNED)
def test_a_users_scores_do_not_depend_on_who_is_asked_about_beside(name: str) -> None:
    histories = worlds.parity_world().histories.train
    rows = np.array([3, 17, 4])
    shorter = histories.where(histories.places < 2 + histories.rows % 5)  # of different lengths, so some are padded
    together = fitted(name).scores(rows, shorter.take(rows))
    alone = [fitted(name).scores(row, shorter.take(row)) for row in rows[:, None]]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4)


@pytest.mark.parametrize("name", [*NEURAL, "ials"])
def test_the_same_seed_gives_the_same_scores_and_another_seed_others(name: str) -> None:
    histories = worlds.parity_world().histories
    first = fitted(name).scores(histories.user, histories.train)
    torch.manual_seed(1234)  # the global generator does not matter
    again, other = (make(name).fit(parity_training(seed)).scores(histories.user, histories.train) for seed in (0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("name", NEURAL)
def test_a_neural_baseline_learns_the_parity_world_in_seconds(name: str) -> None:
    started = time.process_time()
    make(name).fit(parity_training())
    assert time.process_time() - started < 10


@pytest.mark.parametrize("name", FIND_COLD_ITEMS)
def test_an_item_that_nobody_has_taken_is_found_by_its_text(name: str) -> None:
    histories, training = cold_world()
    score_BJ = make(name).fit(training).scores(histories.user, histories.train)
    own, others = score_BJ[histories.user, 20 + histories.user % 2], score_BJ[histories.user, 21 - histories.user % 2]
    assert (own > others).all()
    other_kind_BJ = np.where(np.arange(20) % 2 == histories.user[:, None] % 2, -np.inf, score_BJ[:, :20])
    assert (own > other_kind_BJ.max(axis=1)).all(), "a fitting cold item beats every item of the other kind"


@pytest.mark.parametrize("name", [name for name in READ_ITEM_TEXT if name != "m6_retrieval"])
def test_a_method_that_reads_texts_is_refused_where_there_are_none(name: str) -> None:
    with pytest.raises(DataError, match="no two items share a word"):
        make(name).fit(dataclasses.replace(parity_training(), item_texts=[""] * 20))


@pytest.mark.parametrize("name", ["m6_retrieval", "cllm4rec_emb"])
def test_a_method_that_needs_vectors_asks_for_them(name: str) -> None:
    with pytest.raises(DataError, match="of TrainingData"):
        make(name).fit(dataclasses.replace(parity_training(), item_text_vectors=None, user_table=None))
