"""Popularity: everyone gets the items most people took. The floor every recommender has to clear."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt
from scipy import sparse


class Popularity:
    """An item's score is its number of training interactions, the same for every user."""

    def fit(self, train_IJ: sparse.csr_array) -> Self:
        self.count_J = np.asarray(train_IJ.sum(axis=0), np.float32).ravel()
        return self

    def scores(self, history_BJ: sparse.csr_array) -> npt.NDArray[np.float32]:
        return np.broadcast_to(self.count_J, history_BJ.shape)
