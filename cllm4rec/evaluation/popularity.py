"""Popularity: everyone gets the items most people took. The floor every recommender has to clear."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.evaluation.baseline import Training
from cllm4rec.typing import IntArray


class Popularity:
    """An item's score is its number of training interactions, the same for every user."""

    def fit(self, training: Training) -> Self:
        self.count_J = np.asarray(training.matrix.sum(axis=0), np.float32).ravel()
        return self

    def scores(self, users: IntArray, histories: Ragged) -> npt.NDArray[np.float32]:
        return np.broadcast_to(self.count_J, (len(users), len(self.count_J)))
