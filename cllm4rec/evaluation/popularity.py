"""Popularity: every user gets the items with the most interactions. Every recommender should be better."""

from __future__ import annotations

from typing import Self

import numpy as np

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.typing import Float32Array, IntArray


class Popularity:
    """An item's score is its number of training interactions, the same for every user."""

    def fit(self, training: TrainingData) -> Self:
        self.count_J = np.asarray(training.matrix.sum(axis=0), np.float32).ravel()
        return self

    def scores(self, users: IntArray, histories: Ragged) -> Float32Array:
        return np.broadcast_to(self.count_J, (len(users), len(self.count_J)))
