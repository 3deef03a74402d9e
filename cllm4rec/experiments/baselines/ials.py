"""iALS: matrix factorization of implicit feedback by alternating least squares (Hu, Koren and Volinsky,
"Collaborative Filtering for Implicit Feedback Datasets", ICDM 2008), in the implementation of the library `implicit`."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.experiments.baselines.item_knn import import_implicit
from cllm4rec.metrics.protocol import interaction_matrix
from cllm4rec.typing import IntArray


class IALS:
    """Minimizes sum_uj c_uj (p_uj - x_u·y_j)² + regularization · (|X|² + |Y|²), where p is 1 and c is alpha for an
    interaction, p is 0 and c is 1 elsewhere.

    Scoring computes a user's factors from the given history with the item factors fixed. Nothing is stored per user.
    """

    def __init__(
        self, factors: int = 64, regularization: float = 100.0, alpha: float = 50.0, iterations: int = 20
    ) -> None:
        self.factors, self.regularization, self.alpha, self.iterations = factors, regularization, alpha, iterations

    def fit(self, training: TrainingData) -> Self:
        self.model = import_implicit("cpu.als").AlternatingLeastSquares(
            factors=self.factors,
            regularization=self.regularization,
            alpha=self.alpha,
            iterations=self.iterations,
            use_cg=False,  # exact, and at these sizes as fast as the library's approximation
            random_state=training.seed,
        )
        self.model.fit(sparse.csr_matrix(training.matrix), show_progress=False)
        return self

    def scores(self, users: IntArray, histories: Ragged) -> npt.NDArray[np.float32]:
        item_JF = self.model.item_factors
        history_BJ = sparse.csr_matrix(interaction_matrix(histories, len(item_JF)))
        user_BF = self.model.recalculate_user(np.arange(len(users)), history_BJ)
        return np.asarray(user_BF @ item_JF.T, np.float32)
