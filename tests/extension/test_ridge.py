"""Closed forms against what they stand for: the regression fitted again without a row."""

from __future__ import annotations

import numpy as np
import pytest

from cllm4rec.extension.ridge import Ridge

GENERATOR = np.random.default_rng(0)
FEATURES = GENERATOR.standard_normal((12, 5))
GRAM = FEATURES @ FEATURES.T
WEIGHT = GENERATOR.uniform(0.2, 3.0, 12)
TARGET = FEATURES @ GENERATOR.standard_normal((5, 3)) + GENERATOR.standard_normal((12, 3)) + 7.0


def weighted_fit(rows: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and intercept that minimize Σ weight · |target - prediction|² + strength · |coefficients|²."""
    design = np.column_stack([FEATURES[rows], np.ones(len(rows))])
    penalty = np.diag([strength] * 5 + [0.0])
    weighted = design * WEIGHT[rows, None]
    solution = np.linalg.solve(design.T @ weighted + penalty, weighted.T @ TARGET[rows])
    return solution[:-1], solution[-1]


@pytest.mark.parametrize("strength", [0.1, 2.0])
def test_the_predictions_are_those_of_the_weighted_regression(strength: float) -> None:
    coefficients, intercept = weighted_fit(np.arange(12), strength)
    solution = Ridge(GRAM, WEIGHT).solve(TARGET, strength)
    np.testing.assert_allclose(GRAM @ solution.dual_FD + solution.intercept_D, FEATURES @ coefficients + intercept)


@pytest.mark.parametrize("strength", [0.1, 2.0])
def test_r2_is_that_of_twelve_fits_without_one_row_each(strength: float) -> None:
    error = 0.0
    for row in range(12):
        coefficients, intercept = weighted_fit(np.delete(np.arange(12), row), strength)
        error += WEIGHT[row] * np.square(TARGET[row] - FEATURES[row] @ coefficients - intercept).sum()
    spread = (WEIGHT[:, None] * np.square(TARGET - np.average(TARGET, axis=0, weights=WEIGHT))).sum()
    assert Ridge(GRAM, WEIGHT).solve(TARGET, strength).r2 == pytest.approx(1 - error / spread)


def test_a_kernel_without_information_predicts_the_mean() -> None:
    solution = Ridge(np.zeros((12, 12)), WEIGHT).solve(TARGET, 1.0)
    np.testing.assert_allclose(solution.intercept_D, np.average(TARGET, axis=0, weights=WEIGHT))
    assert -0.3 < solution.r2 <= 0
