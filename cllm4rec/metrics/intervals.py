"""How certain a mean or a difference is: bootstrap intervals and paired tests over users. Pure functions.

Users are the unit of chance. In a comparison a user is in several splits with other items held out, so a draw or an
exchange always moves a whole user with all splits; counting (user, split) pairs as independent would overstate certainty.

Shapes: I users, S splits, M methods, R random draws. `value_IS` holds NaN if a user has nothing to find in a split; every
function that takes `value_IS` takes `value_I` of a single split as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cllm4rec.arrays.ragged import chunks
from cllm4rec.metrics.protocol import CHUNK_VALUES
from cllm4rec.typing import FloatArray, IntArray

CONFIDENCE = 0.95
DRAWS = 10_000
"""Random exchanges of a paired test. The smallest possible p value is 1 / (DRAWS + 1)."""


def interval(value_IS: FloatArray, samples: int, seed: int) -> dict[str, float]:
    """The mean (see `mean_over_splits`) and its percentile 95 % bootstrap interval (Efron 1979): {mean, low, high}.

    Users are drawn with replacement; the same seed draws the same users, whatever is measured. A split that a draw leaves
    without users does not count in it. Raises ValueError if there are no users, or a split has none.
    """
    generator = np.random.default_rng(seed)
    num_users = len(value_IS)
    columns = _columns(value_IS)
    mean_R = np.concatenate(
        [
            _means_of_draws(columns, generator.integers(0, num_users, (len(part), num_users)))
            for part in chunks(samples, max(1, CHUNK_VALUES // num_users))
        ]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(mean_R[~np.isnan(mean_R)], [tail, 1 - tail])
    return {"mean": mean_over_splits(value_IS), "low": float(low), "high": float(high)}


def summarize(per_user: Mapping[str, FloatArray], samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Metric → mean and 95 % interval, the form of `results` in `metrics.json`."""
    return {name: interval(value_IS, samples, seed) for name, value_IS in per_user.items()}


def mean_over_splits(value_IS: FloatArray) -> float:
    """The mean over splits of the mean over the users of a split. Raises ValueError if a split has no user."""
    return float(np.mean([column_I[~np.isnan(column_I)].mean() for column_I in _columns(value_IS)]))


def _columns(value_IS: FloatArray) -> list[FloatArray]:
    """The values of each split."""
    columns = [value_IS] if value_IS.ndim == 1 else list(value_IS.T)
    if not columns or any(np.isnan(column_I).all() for column_I in columns):
        raise ValueError("there are no values of a split to take a mean of; leave the split out")
    return columns


def _means_of_draws(columns: list[FloatArray], drawn_RI: IntArray) -> FloatArray:
    """`mean_over_splits` of the drawn users; NaN if a draw has no value in any split."""
    mean_SR = np.stack([_drawn_means(column_I[drawn_RI]) for column_I in columns])
    return mean_SR[0] if len(columns) == 1 else _mean_without_nan(mean_SR.T)


def _drawn_means(value_RI: FloatArray) -> FloatArray:
    return _mean_without_nan(value_RI) if np.isnan(value_RI).any() else np.asarray(value_RI.mean(axis=1))


def _mean_without_nan(value_RN: FloatArray) -> FloatArray:
    """The mean of each row over its numbers; NaN for a row without any. (`np.nanmean` also warns of such a row.)"""
    is_number_RN = ~np.isnan(value_RN)
    num_R, total_R = is_number_RN.sum(axis=1), np.where(is_number_RN, value_RN, 0.0).sum(axis=1)
    return np.asarray(np.divide(total_R, num_R, out=np.full(len(value_RN), np.nan), where=num_R > 0))


def randomization_test(differences: Mapping[str, FloatArray], seed: int, draws: int = DRAWS) -> dict[str, float]:
    """Two-sided p values of paired randomization tests (Fisher 1935): under the null hypothesis the two results of a user
    are exchangeable. `differences` are value_IS by name; all are tested with the same exchanges.

    p is (1 + number of draws at least as far from 0 as the observed mean) / (1 + draws), so it is never 0.
    """
    share_IM = np.stack([_shares(difference_IS) for difference_IS in differences.values()], axis=1)
    observed_M = np.abs(share_IM.sum(axis=0))
    least_M = observed_M - 1e-12 * np.abs(share_IM).sum(axis=0)  # equal except for rounding counts as equal
    num_users, num_reached_M = len(share_IM), np.zeros(len(differences))
    for sign_RI in _random_signs(num_users, draws, seed):
        num_reached_M += (np.abs(sign_RI @ share_IM) >= least_M).sum(axis=0)
    return dict(zip(differences, ((1 + num_reached_M) / (1 + draws)).tolist(), strict=True))


def _random_signs(num_users: int, draws: int, seed: int) -> Iterator[FloatArray]:
    generator = np.random.default_rng(seed)
    for part in chunks(draws, max(1, CHUNK_VALUES // num_users)):
        yield np.asarray(generator.integers(0, 2, (len(part), num_users)) * 2.0 - 1.0)


def _shares(difference_IS: FloatArray) -> FloatArray:
    """What each user adds to the mean over splits of the mean over users."""
    difference_IS = difference_IS[:, None] if difference_IS.ndim == 1 else difference_IS
    num_users_S = (~np.isnan(difference_IS)).sum(axis=0)
    return np.asarray(np.nansum(difference_IS / num_users_S, axis=1) / difference_IS.shape[1])


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values adjusted for testing all of them (Holm 1979): reject those that are below the level."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, least = {}, 0.0
    for position, name in enumerate(ordered):
        least = max(least, min(1.0, (len(ordered) - position) * p_values[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


def compared_with(
    reference: str, values: Mapping[str, FloatArray], samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Every other method minus `reference`, user by user: interval, p, and Holm's p for this family of tests."""
    differences = {name: value_IS - values[reference] for name, value_IS in values.items() if name != reference}
    if not differences:
        return {}
    p_values = randomization_test(differences, seed)
    adjusted = holm(p_values)
    return {
        name: {
            "against": reference,
            "difference": interval(difference_IS, samples, seed),
            "p": p_values[name],
            "p_holm": adjusted[name],
        }
        for name, difference_IS in differences.items()
    }


def against_best_other(values: Mapping[str, FloatArray], samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Each method against the best of the others: all against the best, and the best against the second.

    The test of the best is that of the second with the sides exchanged, so it does not enlarge Holm's family.
    """
    best, *others = sorted(values, key=lambda name: -mean_over_splits(values[name]))
    found = compared_with(best, values, samples, seed)
    if others:
        second = found[others[0]]
        low, mean, high = (second["difference"][end] for end in ("low", "mean", "high"))
        found[best] = {
            **second,
            "against": others[0],
            "difference": {"mean": 0.0 - mean, "low": 0.0 - high, "high": 0.0 - low},
        }
    return found
