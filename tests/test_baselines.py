"""Baselines on worlds whose answer is known, and on real data whose figures were measured by others."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cllm4rec.baselines.ease import EASE, GRID, tune_ease
from cllm4rec.baselines.popularity import Popularity
from cllm4rec.config import EvaluateConfig
from cllm4rec.data.prepared import Histories
from cllm4rec.data.ragged import Ragged
from cllm4rec.evaluation.metrics import compute
from cllm4rec.evaluation.protocol import HeldOut, Recommender, Validation, interaction_matrix, means, rank_with

SHARED = Path(os.environ.get("CLLM4REC_SHARED", Path(__file__).parents[1] / "../shared"))
REVIEWS = SHARED / "data/amazon_musical_instruments/reviews_Musical_Instruments_5.json.gz"


def parity_world(num_users: int = 64, num_items: int = 12) -> Histories:
    """Even users like even items and odd users odd ones: each hides one liked item for validation and one for test."""
    orders = [np.random.default_rng(user).permutation(np.arange(user % 2, num_items, 2)) for user in range(num_users)]
    cut = [Ragged.from_lists([order[part] for order in orders]) for part in (slice(2, None), slice(0, 1), slice(1, 2))]
    return Histories(np.arange(num_users), *cut)


def noisy_world(num_users: int = 300, num_items: int = 60, seed: int = 0) -> Histories:
    """Parity users who take a third of their items anywhere."""
    generator = np.random.default_rng(seed)
    orders = []
    for user in range(num_users):
        weights = np.where(np.arange(num_items) % 2 == user % 2, 2.0, 1.0)
        orders.append(generator.choice(num_items, 8, replace=False, p=weights / weights.sum()))
    cut = [Ragged.from_lists([order[part] for order in orders]) for part in (slice(2, None), slice(0, 1), slice(1, 2))]
    return Histories(np.arange(num_users), *cut)


def recall(fitted: Recommender, histories: Histories, num_items: int, k: int) -> float:
    held_out = HeldOut.test(histories, EvaluateConfig())
    ranked_BK = rank_with(fitted, held_out.read, held_out.masked, num_items, k)
    return float(compute(ranked_BK, held_out.relevant, [f"recall@{k}"])[f"recall@{k}"].mean())


def test_popularity_ranks_by_training_interactions_with_ties_to_the_lower_index() -> None:
    train = Ragged.from_lists([[3, 1], [3, 2], [3]])
    popularity = Popularity().fit(interaction_matrix(train, 5))
    nobody = Ragged.from_lists([[]])
    assert rank_with(popularity, nobody, nobody, 5, 5).tolist() == [[3, 1, 2, 0, 4]]


def test_ease_finds_the_hidden_item_of_the_parity_world_and_popularity_does_not() -> None:
    world = parity_world()
    train_IJ = interaction_matrix(world.train, 12)
    assert recall(EASE(1.0).fit(train_IJ), world, 12, 1) == 1.0
    assert recall(Popularity().fit(train_IJ), world, 12, 1) < 0.7


def test_ease_is_the_ridge_regression_of_each_item_on_the_others() -> None:
    train_IJ = interaction_matrix(noisy_world().train, 60)
    dense_IJ, strength = train_IJ.toarray().astype(np.float64), 7.0
    weight_JJ = EASE(strength).fit(train_IJ).weight_JJ
    for item in (0, 17, 59):
        others = np.delete(np.arange(60), item)
        x, y = dense_IJ[:, others], dense_IJ[:, item]
        expected = np.linalg.solve(x.T @ x + strength * np.eye(59), x.T @ y)
        np.testing.assert_allclose(weight_JJ[others, item], expected, atol=1e-5)
        assert weight_JJ[item, item] == 0


def test_tuning_takes_the_best_regularisation_of_the_validation_split() -> None:
    world = noisy_world()
    train_IJ, validation = interaction_matrix(world.train, 60), Validation(world)
    best, reached = tune_ease(train_IJ, validation)
    by_hand = {}
    for strength in GRID:
        ranked_BK = rank_with(EASE(strength).fit(train_IJ), world.train, world.train, 60, 20)
        by_hand[strength] = means(validation.metrics(ranked_BK))["recall@20"]
    assert reached == pytest.approx(by_hand)
    assert len(set(reached.values())) > 1
    assert reached[best.regularisation] == max(by_hand.values())
    np.testing.assert_array_equal(best.weight_JJ, EASE(best.regularisation).fit(train_IJ).weight_JJ)


def test_tuning_takes_the_stronger_of_two_equal_regularisations() -> None:
    world = parity_world()
    best, _ = tune_ease(interaction_matrix(world.train, 12), Validation(world), (1.0, 100.0, 10.0))
    assert best.regularisation == 100.0


def test_tuning_without_validation_items_is_refused() -> None:
    world = parity_world()
    nothing = Histories(world.user, world.train, Ragged.from_lists([[]] * 64), world.test)
    with pytest.raises(ValueError, match="nothing to tune EASE on"):
        tune_ease(interaction_matrix(world.train, 12), Validation(nothing))


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
        train_IJ = interaction_matrix(histories.train, num_items)
        ease, _ = tune_ease(train_IJ, Validation(histories))
        reached["popularity"].append(recall(Popularity().fit(train_IJ), histories, num_items, 20))
        reached["ease"].append(recall(ease, histories, num_items, 20))
    # Two standard errors of a mean over three random splits (0.015 between splits, measured over 12).
    assert np.mean(reached["popularity"]) == pytest.approx(0.241, abs=0.018)
    assert np.mean(reached["ease"]) == pytest.approx(0.280, abs=0.018)
