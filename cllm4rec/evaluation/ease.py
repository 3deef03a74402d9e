"""EASE: a linear item-to-item model in closed form (Steck,
"Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019).

Implemented here because the closed form is one matrix inverse, shorter than an adapter for a library.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from scipy import linalg, sparse
from tqdm import tqdm

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.metrics.protocol import interaction_matrix, means, rank_with
from cllm4rec.metrics.ranking import depth
from cllm4rec.typing import Float32Array, FloatArray, IntArray

GRID = tuple(float(value) for value in np.logspace(1, 4, 9).round(1))
"""Regularizations tried on the validation split."""

TUNED_ON = "recall@20"

MAX_ITEMS = 20_000
"""A fit of this many items takes 9 GiB (three J × J matrices of float64); its time grows with the cube."""


class EASE:
    """score = history · W, where W is the ridge regression of every item on all the others (its diagonal is 0)."""

    def __init__(self, regularization: float = 100.0) -> None:
        self.regularization = regularization

    def fit(self, training: TrainingData) -> Self:
        return self.fit_gram(gram(training.matrix))

    def fit_gram(self, gram_JJ: FloatArray) -> Self:
        """Fit from X'X, which a search over regularizations computes once."""
        regularized_JJ = gram_JJ.copy()
        regularized_JJ[np.diag_indices_from(regularized_JJ)] += self.regularization
        # A symmetric matrix equals its transpose, which has LAPACK's memory order: it is inverted in place, without a copy.
        weight_JJ = linalg.inv(regularized_JJ.T, overwrite_a=True, check_finite=False)
        weight_JJ /= -np.diag(weight_JJ)
        np.fill_diagonal(weight_JJ, 0.0)
        self.weight_JJ = weight_JJ.astype(np.float32, order="C")
        return self

    def scores(self, users: IntArray, histories: Ragged) -> Float32Array:
        return np.asarray(interaction_matrix(histories, len(self.weight_JJ)) @ self.weight_JJ, np.float32)


def gram(train_IJ: sparse.csr_array) -> FloatArray:
    """X'X: the number of users who have both items."""
    return np.asarray((train_IJ.T @ train_IJ).toarray(), np.float64)


def tune_ease(training: TrainingData, grid: tuple[float, ...] = GRID) -> tuple[EASE, dict[float, float]]:
    """The best EASE of a grid by TUNED_ON on the validation split, and the value of every regularization.

    Fitted on the training split alone, like CLLM4Rec's tables. Of equal values the stronger regularization wins. Raises
    ValueError if no user has a validation item.
    """
    validation = training.validation
    if not len(validation.users):
        raise ValueError("no user has a validation item, so there is nothing to tune EASE on")
    gram_JJ, num_items = gram(training.matrix), training.num_items
    reached: dict[float, float] = {}
    best = EASE(min(grid))
    for regularization in tqdm(sorted(grid), desc="tune ease", unit="fit", disable=None):
        candidate = EASE(regularization).fit_gram(gram_JJ)
        ranked_BK = rank_with(
            candidate, validation.users, validation.read, validation.read, num_items, depth([TUNED_ON])
        )
        reached[regularization] = means(validation.metrics(ranked_BK))[TUNED_ON]
        if reached[regularization] >= reached[best.regularization]:
            best = candidate
    return best, reached
