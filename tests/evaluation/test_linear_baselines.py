"""Popularity, EASE, iALS and ItemKNN against slow references, and against figures measured by others on real data."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from support.shared import SHARED
from support.trainings import cold_world, noisy_world, parity_training, recall, training_of

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.errors import ConfigError
from cllm4rec.evaluation.ease import EASE, GRID, tune_ease
from cllm4rec.evaluation.popularity import Popularity
from cllm4rec.experiments.baselines import item_knn
from cllm4rec.experiments.baselines.ease_text import EASEText
from cllm4rec.experiments.baselines.ials import IALS
from cllm4rec.experiments.baselines.item_knn import ItemKNN
from cllm4rec.experiments.baselines.text import tf_idf
from cllm4rec.metrics.protocol import Validation, means, rank_with

REVIEWS = SHARED / "data/amazon_musical_instruments/reviews_Musical_Instruments_5.json.gz"


def parity_world(num_users: int = 64, num_items: int = 12) -> Histories:
    """Even users like even items and odd users odd ones: each hides one liked item for validation and one for test."""
    orders = [np.random.default_rng(user).permutation(np.arange(user % 2, num_items, 2)) for user in range(num_users)]
    cut = [Ragged.from_lists([order[part] for order in orders]) for part in (slice(2, None), slice(0, 1), slice(1, 2))]
    return Histories(np.arange(num_users), *cut)


def test_popularity_ranks_by_training_interactions_with_ties_to_the_lower_index() -> None:
    train = Ragged.from_lists([[3, 1], [3, 2], [3]])
    nothing = Ragged.from_lists([[], [], []])
    popularity = Popularity().fit(training_of(Histories(np.arange(3), train, nothing, nothing), 5))
    nobody = nothing.take(np.array([0]))
    assert rank_with(popularity, np.array([-1]), nobody, nobody, 5, 5).tolist() == [[3, 1, 2, 0, 4]]


def test_ease_finds_the_hidden_item_of_the_parity_world_and_popularity_does_not() -> None:
    world = parity_world()
    training = training_of(world, 12)
    assert recall(EASE(1.0).fit(training), world, 12, 1) == 1.0
    assert recall(Popularity().fit(training), world, 12, 1) < 0.7


def test_ease_is_the_ridge_regression_of_each_item_on_the_others() -> None:
    training = training_of(noisy_world(), 60)
    dense_IJ, strength = training.matrix.toarray().astype(np.float64), 7.0
    weight_JJ = EASE(strength).fit(training).weight_JJ
    for item in (0, 17, 59):
        others = np.delete(np.arange(60), item)
        x, y = dense_IJ[:, others], dense_IJ[:, item]
        expected = np.linalg.solve(x.T @ x + strength * np.eye(59), x.T @ y)
        np.testing.assert_allclose(weight_JJ[others, item], expected, atol=1e-5)
        assert weight_JJ[item, item] == 0


def test_tuning_takes_the_best_regularization_of_the_validation_split() -> None:
    world = noisy_world()
    training, validation = training_of(world, 60), Validation(world)
    best, reached = tune_ease(training)
    by_hand = {}
    for strength in GRID:
        ranked_BK = rank_with(EASE(strength).fit(training), world.user, world.train, world.train, 60, 20)
        by_hand[strength] = means(validation.metrics(ranked_BK))["recall@20"]
    assert reached == pytest.approx(by_hand)
    assert len(set(reached.values())) > 1
    assert reached[best.regularization] == max(by_hand.values())
    np.testing.assert_array_equal(best.weight_JJ, EASE(best.regularization).fit(training).weight_JJ)


def test_tuning_takes_the_stronger_of_two_equal_regularizations() -> None:
    world = parity_world()
    best, _ = tune_ease(training_of(world, 12), (1.0, 100.0, 10.0))
    assert best.regularization == 100.0


def test_tuning_without_validation_items_is_refused() -> None:
    world = parity_world()
    nothing = Histories(world.user, world.train, Ragged.from_lists([[]] * 64), world.test)
    with pytest.raises(ValueError, match="nothing to tune EASE on"):
        tune_ease(training_of(nothing, 12))


def test_ease_without_text_knows_nothing_of_cold_items() -> None:
    histories, training = cold_world()
    assert not EASE(1.0).fit(training).scores(histories.user, histories.train)[:, 20:].any()


def test_ease_with_text_of_no_weight_is_ease() -> None:
    training = parity_training()
    plain, text = EASE(7.0).fit(training), EASEText(7.0, alpha=0.0).fit(training)
    np.testing.assert_array_equal(plain.weight_JJ, text.weight_JJ)
    assert np.abs(EASEText(7.0, alpha=3.0).fit(training).weight_JJ - plain.weight_JJ).max() > 1e-3


def test_ease_with_text_is_ease_on_users_and_words_together() -> None:
    training, alpha = parity_training(), 2.0
    stacked_NJ = np.concatenate([training.matrix.toarray(), alpha * tf_idf(training.item_texts).toarray().T])
    weight_JJ = EASEText(5.0, alpha).fit(training).weight_JJ
    others = np.arange(1, 20)
    x, y = stacked_NJ[:, others].astype(np.float64), stacked_NJ[:, 0].astype(np.float64)
    np.testing.assert_allclose(weight_JJ[others, 0], np.linalg.solve(x.T @ x + 5.0 * np.eye(19), x.T @ y), atol=1e-5)


def slow_als(train_IJ: np.ndarray, item_JF: np.ndarray, alpha: float, strength: float, rounds: int) -> np.ndarray:
    """Scores after alternating weighted ridge regressions, one user and one item at a time (Hu et al., Eq. 4 and 5)."""

    def solve(rows: np.ndarray, fixed: np.ndarray) -> np.ndarray:
        solved = []
        for row in rows:
            confidence = np.diag(np.where(row > 0, alpha, 1.0))
            left = fixed.T @ confidence @ fixed + strength * np.eye(fixed.shape[1])
            solved.append(np.linalg.solve(left, fixed.T @ confidence @ (row > 0)))
        return np.array(solved)

    for _ in range(rounds):
        item_JF = solve(train_IJ.T, solve(train_IJ, item_JF))
    return solve(train_IJ, item_JF) @ item_JF.T


def test_ials_is_alternating_least_squares() -> None:
    pytest.importorskip("implicit", reason="the extra `baselines` is not installed")
    training = training_of(noisy_world(40, 15), 15)
    # What `implicit` starts from: users first, then items.
    random = np.random.default_rng(training.seed)
    _, start_JF = (random.random((rows, 4), dtype=np.float32) * 0.01 for rows in (40, 15))
    expected = slow_als(training.matrix.toarray().astype(np.float64), start_JF.astype(np.float64), 5.0, 0.7, 6)
    reached = IALS(4, 0.7, 5.0, iterations=6).fit(training).scores(np.arange(40), training.histories)
    np.testing.assert_allclose(reached, expected, atol=2e-3)


def test_item_knn_adds_up_cosines_of_the_nearest_items() -> None:
    pytest.importorskip("implicit", reason="the extra `baselines` is not installed")
    training = training_of(noisy_world(500, 12), 12)
    dense_IJ = training.matrix.toarray().astype(np.float64)
    cosine_JJ = dense_IJ.T @ dense_IJ / np.sqrt(np.outer(dense_IJ.sum(0), dense_IJ.sum(0)))
    everyone = ItemKNN(neighbors=12).fit(training).scores(np.arange(500), training.histories)
    np.testing.assert_allclose(everyone, dense_IJ @ cosine_JJ, atol=1e-5)
    nearest_JJ = np.where(cosine_JJ >= np.sort(cosine_JJ, axis=1)[:, [-4]], cosine_JJ, 0)  # itself and three others
    assert ((nearest_JJ > 0).sum(axis=1) == 4).all(), "no ties"
    few = ItemKNN(neighbors=3).fit(training).scores(np.arange(500), training.histories)
    np.testing.assert_allclose(few, dense_IJ @ nearest_JJ.T, atol=1e-5)


def test_without_implicit_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(item_knn.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"cllm4rec\[experiments\]"):
        ItemKNN().fit(parity_training())


def musical_instruments(seed: int) -> tuple[Histories, int]:
    """Ratings above 3, 5-core, a random 80/10/10 split: read here without the project's own sources."""
    with gzip.open(REVIEWS, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    pairs = [(row["reviewerID"], row["asin"]) for row in rows if row["overall"] > 3]
    while True:
        users, items = Counter(user for user, _ in pairs), Counter(item for _, item in pairs)
        kept = [(user, item) for user, item in pairs if users[user] >= 5 and items[item] >= 5]
        if len(kept) == len(pairs):
            break
        pairs = kept
    index = {item: place for place, item in enumerate(sorted(items))}
    taken: dict[str, list[int]] = {user: [] for user in sorted(users)}
    for user, item in pairs:
        taken[user].append(index[item])
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(values) for values in taken.values()]
    tenths = [max(1, len(order) // 10) for order in orders]
    cuts = [(order[2 * n :], order[:n], order[n : 2 * n]) for order, n in zip(orders, tenths, strict=True)]
    train, validation, test = (Ragged.from_lists(parts) for parts in zip(*cuts, strict=True))
    return Histories(np.arange(len(orders)), train, validation, test), len(index)


@pytest.mark.skipif(not REVIEWS.exists(), reason=f"no shared data: {REVIEWS.name}; set CLLM4REC_SHARED")
def test_musical_instruments_reach_the_figures_measured_elsewhere() -> None:
    reached: dict[str, list[float]] = {"popularity": [], "ease": []}
    for seed in range(3):
        histories, num_items = musical_instruments(seed)
        assert (len(histories.user), num_items) == (526, 347)
        training = training_of(histories, num_items)
        ease, _ = tune_ease(training)
        reached["popularity"].append(recall(Popularity().fit(training), histories, num_items, 20))
        reached["ease"].append(recall(ease, histories, num_items, 20))
    # Two standard errors of a mean over three random splits (0.015 between splits, measured over 12).
    assert np.mean(reached["popularity"]) == pytest.approx(0.241, abs=0.018)
    assert np.mean(reached["ease"]) == pytest.approx(0.280, abs=0.018)
