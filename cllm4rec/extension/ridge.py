"""Weighted kernel ridge regression with an intercept, and its leave-one-out residuals in closed form.

Row i has noise of variance strength / weight_i. With A = gram + strength · diag(1 / weight) and
P = A⁻¹ - A⁻¹11ᵀA⁻¹ / 1ᵀA⁻¹1, the residual of row i when row i is left out is (P target)_i / P_ii (generalized least squares;
Craven and Wahba 1979 for equal weights). One eigendecomposition serves all strengths.

Shapes: F fitted rows, D targets.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cllm4rec.typing import FloatArray


@dataclasses.dataclass(frozen=True)
class Solution:
    """predictions = kernel(new rows, fitted rows) · dual_FD + intercept_D.

    r2: the share of the weighted variance of the targets that is predicted when each row is left out of its own fit. At most
    1; about 0 if the kernel says nothing about the targets.
    """

    dual_FD: FloatArray
    intercept_D: FloatArray
    r2: float


class Ridge:
    """The regressions of all strengths for one kernel."""

    def __init__(self, gram_FF: FloatArray, weight_F: FloatArray) -> None:
        """gram_FF: symmetric and positive semidefinite. weight_F: positive."""
        self.weight_F = np.asarray(weight_F, np.float64)
        root_F = np.sqrt(self.weight_F)
        self._value_F, vector_FF = np.linalg.eigh(root_F[:, None] * np.asarray(gram_FF, np.float64) * root_F)
        self._value_F = self._value_F.clip(0.0)
        self._vector_FF = root_F[:, None] * vector_FF

    def solve(self, target_FD: FloatArray, strength: float) -> Solution:
        vector_FF, scale_F = self._vector_FF, 1.0 / (self._value_F + strength)
        inverse_target_FD = vector_FF @ (scale_F[:, None] * (vector_FF.T @ target_FD))
        inverse_one_F = vector_FF @ (scale_F * vector_FF.sum(axis=0))
        intercept_D = inverse_one_F @ target_FD / inverse_one_F.sum()
        dual_FD = inverse_target_FD - inverse_one_F[:, None] * intercept_D
        diagonal_F = np.square(vector_FF) @ scale_F - np.square(inverse_one_F) / inverse_one_F.sum()
        error = self._squares(dual_FD / diagonal_F[:, None])
        mean_D = np.average(target_FD, axis=0, weights=self.weight_F)
        return Solution(dual_FD, intercept_D, 1.0 - error / max(self._squares(target_FD - mean_D), _TINY))

    def _squares(self, value_FD: FloatArray) -> float:
        return float(self.weight_F @ np.square(value_FD).sum(axis=1))


_TINY = np.finfo(np.float64).tiny
