"""Item-cold splits: some items are taken out of training whole, and ranked by rows that their texts predict.

The rows of the other items are trained without a language model (`baselines.no_lm`), so that readers of texts differ in nothing
but what they read.

Shapes: I users, J items, W of them warm, C cold, D width of the rows.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ids import Catalog, remap_items
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.arrays.random import Stream, hash_uniform
from cllm4rec.data.split import hash_ids
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.experiments.baselines.neural import Neural
from cllm4rec.experiments.baselines.no_lm import NoLM
from cllm4rec.extension.text_kernels import Texts
from cllm4rec.extension.text_regression import Reading, TextRegression, fit
from cllm4rec.metrics.ranking import compute, depth, rank_scores
from cllm4rec.typing import BoolArray, Float32Array, FloatArray, IntArray

COLD_METRICS = ("recall@10", "recall@20")
"""Of the cold items, ranked among themselves."""
ALL_METRICS = ("recall@20",)
"""Of all items, ranked together."""


@dataclasses.dataclass(frozen=True)
class Split:
    """One item-cold split of a prepared data set.

    is_cold_J: the items without training. histories: of the other items, by their number among them.
    cold: for each user, the cold items that the user has in any split, by item index.
    """

    is_cold_J: BoolArray
    histories: Histories
    cold: Ragged

    @classmethod
    def of(cls, histories: Histories, catalog: Catalog, fraction: float, seed: int) -> Split:
        """Items with a text are cold with probability `fraction`, by a hash of id and seed."""
        has_text_J = np.array([bool(text) for text in catalog.item_texts])
        is_cold_J = (hash_uniform(seed, 0, Stream.COLD, hash_ids(catalog.item_ids)) < fraction) & has_text_J
        warm_number = np.where(is_cold_J, -1, np.cumsum(~is_cold_J) - 1)
        everything = histories.together("train", "validation", "test")
        warm = Histories(
            histories.user,
            *(remap_items(getattr(histories, name), warm_number) for name in ("train", "validation", "test")),
        )
        return cls(is_cold_J, warm, everything.where(is_cold_J[everything.values]))

    @functools.cached_property
    def warm_items(self) -> IntArray:
        """The items of `histories` by item index, (W,)."""
        return np.flatnonzero(~self.is_cold_J)

    @functools.cached_property
    def cold_items(self) -> IntArray:
        """The items without training by item index, (C,)."""
        return np.flatnonzero(self.is_cold_J)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The rows of the warm items, and the queries of all users from their warm training items.

    queries_ID: of all users. query · row is the logit.
    """

    split: Split
    rows_WD: Float32Array
    queries_ID: Float32Array

    @classmethod
    def of(cls, split: Split, catalog: Catalog, seed: int) -> Trained:
        texts = [catalog.item_texts[item] for item in split.warm_items.tolist()]
        known = Catalog(catalog.user_ids.tolist(), catalog.item_ids[split.warm_items].tolist(), item_texts=texts)
        model = Neural(NoLM).fit(TrainingData.of(split.histories, known, seed=seed))
        network: NoLM = model.network  # type: ignore[assignment]
        queries_ID = network.queries(split.histories.train).detach().numpy()
        return cls(split, network.rows_JD.detach().numpy(), queries_ID)

    def regression(self, texts: Texts, readings: list[Reading]) -> TextRegression:
        """Fitted on the warm items with a text. texts: of all items."""
        warm = self.split.warm_items
        count_W = np.bincount(self.split.histories.train.values, minlength=len(warm))
        fitted = np.flatnonzero(np.array([bool(texts.texts[item]) for item in warm.tolist()]) & (count_W > 0))
        return fit(texts.take(warm[fitted]), np.asarray(self.rows_WD[fitted], np.float64), count_W[fitted], readings)

    def among_cold(self, rows_CD: Float32Array) -> dict[str, FloatArray]:
        """COLD_METRICS of each user, (I,); NaN for a user without a cold item or without a warm one."""
        split = self.split
        users = np.flatnonzero((split.cold.lengths > 0) & (split.histories.train.lengths > 0))
        number = np.full(len(split.is_cold_J), -1)
        number[split.cold_items] = np.arange(len(split.cold_items))
        relevant = remap_items(split.cold.take(users), number)
        scores_BC: Float32Array = self.queries_ID[users] @ rows_CD.T
        return self._values(users, scores_BC, Ragged.empty(len(users)), relevant, COLD_METRICS)

    def among_all(self, rows_CD: Float32Array | None) -> dict[str, FloatArray]:
        """ALL_METRICS of each user's warm test items, (I,), with the cold items in the catalog, or without any (None)."""
        histories = self.split.histories
        users = np.flatnonzero((histories.test.lengths > 0) & (histories.train.lengths > 0))
        rows_JD: Float32Array = self.rows_WD if rows_CD is None else np.concatenate([self.rows_WD, rows_CD])
        masked = histories.together("train", "validation").take(users)
        scores_BJ: Float32Array = self.queries_ID[users] @ rows_JD.T
        return self._values(users, scores_BJ, masked, histories.test.take(users), ALL_METRICS)

    def _values(
        self, users: IntArray, scores_BN: Float32Array, masked: Ragged, relevant: Ragged, metrics: tuple[str, ...]
    ) -> dict[str, FloatArray]:
        ranked_BK, _ = rank_scores(scores_BN, masked, depth(metrics))
        values = {}
        for name, value_B in compute(ranked_BK, relevant, metrics).items():
            values[name] = np.full(len(self.queries_ID), np.nan)
            values[name][users] = value_B
        return values
