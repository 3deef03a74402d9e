"""Training data for tests of baselines: worlds whose answer is known, informative vectors, and fitted methods."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data import world as worlds
from cllm4rec.evaluation.baseline import Baseline, Budget, TrainingData
from cllm4rec.experiments.baselines.registry import BASELINES, make
from cllm4rec.metrics.protocol import HeldOut, Recommender, Validation, rank_with
from cllm4rec.metrics.ranking import compute

LEARNED = [name for name in BASELINES if name != "popularity"]
NEURAL = ["no_lm", "multi_vae", "md_cvae", "bert4rec", "s3rec", "sasrec", "two_tower", "m6_retrieval", "cllm4rec_emb"]


def training_of(histories: Histories, num_items: int, **changes: object) -> TrainingData:
    without_texts = TrainingData(
        num_items, histories.train, Validation(histories), [""] * num_items, [""] * len(histories.user)
    )
    return dataclasses.replace(without_texts, **changes)


def noisy_world(num_users: int = 300, num_items: int = 60, seed: int = 0) -> Histories:
    """The parity world with noise: about a third of each user's items is of the other kind."""
    generator = np.random.default_rng(seed)
    orders = []
    for user in range(num_users):
        weights = np.where(np.arange(num_items) % 2 == user % 2, 2.0, 1.0)
        orders.append(generator.choice(num_items, 8, replace=False, p=weights / weights.sum()))
    cut = [Ragged.from_lists([order[part] for order in orders]) for part in (slice(2, None), slice(0, 1), slice(1, 2))]
    return Histories(np.arange(num_users), *cut)


def vectors(num_rows: int, seed: int, parity: bool = True) -> np.ndarray:
    """One dimension holds the parity of the row; seven smaller dimensions are noise."""
    noise = np.random.default_rng(seed).normal(0.0, 0.3, (num_rows, 7))
    signal = np.where(np.arange(num_rows) % 2, 1.0, -1.0) * parity
    return np.column_stack([signal, noise]).astype(np.float32)


def with_vectors(training: TrainingData) -> TrainingData:
    """Adds vectors in place of those of a language model and CLLM4Rec's tables."""
    num_users, num_items = len(training.histories), training.num_items
    return dataclasses.replace(
        training,
        item_text_vectors=vectors(num_items, 1),
        item_table=vectors(num_items, 2),
        user_table=vectors(num_users, 3, parity=False),
    )


def parity_training(seed: int = 0) -> TrainingData:
    world = worlds.parity_world()
    return with_vectors(TrainingData.of(world.histories, world.catalog, seed=seed, budget=Budget(60, 60.0)))


def cold_world() -> tuple[Histories, TrainingData]:
    """The parity world with two cold items, one of each kind by its text. The test item of each user is the cold item of the
    user's kind."""
    world = worlds.parity_world()
    test = Ragged.from_lists([[20 + user % 2] for user in range(world.num_users)])
    histories = dataclasses.replace(world.histories, test=test)
    texts = [*world.catalog.item_texts, *world.catalog.item_texts[:2]]
    catalog = Catalog(world.catalog.user_ids, [f"item-{item:02d}" for item in range(22)], None, texts)
    return histories, with_vectors(TrainingData.of(histories, catalog, budget=Budget(60, 60.0)))


@functools.cache
def fitted(name: str) -> Baseline:
    if name in ("item_knn", "ials"):
        pytest.importorskip("implicit", reason="the extra `experiments` is not installed")
    return make(name).fit(parity_training())


def network_of(name: str, training: TrainingData, **params: Any) -> Any:
    """A neural baseline's network, untrained."""
    return make(name, **params).fit(dataclasses.replace(training, budget=Budget(0, 60.0))).network.eval()


def recall(fitted: Recommender, histories: Histories, num_items: int, k: int) -> float:
    held_out = HeldOut.test(histories)
    ranked_BK = rank_with(fitted, held_out.users, held_out.read, held_out.masked, num_items, k)
    return float(compute(ranked_BK, held_out.relevant, [f"recall@{k}"])[f"recall@{k}"].mean())
