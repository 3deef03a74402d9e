"""How sure the comparison is: intervals, paired tests and what lists are like beside their accuracy. Pure functions.

Users are the unit of chance. A user is in several splits with other items held out, so whatever is redrawn or
exchanged is a whole user, with all splits: counting (user, split) pairs as independent would feign certainty.

Shapes: I users, S splits, M methods, R random draws, J items, B rows of lists, K places. `value_IS` holds NaN where a
user has nothing to find in a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm4rec.arrays.ragged import chunks
from cllm4rec.metrics.protocol import CHUNK_VALUES, CONFIDENCE
from cllm4rec.typing import FloatArray, IntArray

DRAWS = 10_000
"""Random exchanges of a paired test: the smallest p value is 1 / (DRAWS + 1)."""


def mean_over_splits(value_IS: FloatArray) -> float:
    """Mean over splits of the mean over a split's users."""
    return float(np.nanmean(value_IS, axis=0).mean())


def interval(value_IS: FloatArray, samples: int, seed: int) -> dict[str, float]:
    """`mean_over_splits` and its percentile 95 % bootstrap interval over users (Efron 1979): {mean, low, high}.

    The same seed redraws the same users whatever is measured. Raises ValueError where a split has no user.
    """
    present_IS = ~np.isnan(value_IS)
    if not present_IS.any(axis=0).all():
        raise ValueError("a split has no user to take a mean of; leave it out")
    value_IS = np.where(present_IS, value_IS, 0.0)
    means = [
        _split_means(times_RI, value_IS, present_IS.astype(np.float64))
        for times_RI in _redrawn(len(value_IS), samples, seed)
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(np.concatenate(means), [tail, 1 - tail])
    return {"mean": float((value_IS.sum(0) / present_IS.sum(0)).mean()), "low": float(low), "high": float(high)}


def _split_means(times_RI: FloatArray, value_IS: FloatArray, present_IS: FloatArray) -> FloatArray:
    """Of each draw; a split that a draw left without users is passed over."""
    num_RS = times_RI @ present_IS
    mean_RS = np.divide(times_RI @ value_IS, num_RS, out=np.full(num_RS.shape, np.nan), where=num_RS > 0)
    drawn_RS = ~np.isnan(mean_RS)
    num_splits_R = drawn_RS.sum(axis=1)
    total_R = np.where(drawn_RS, mean_RS, 0.0).sum(axis=1)
    return np.asarray(np.divide(total_R, num_splits_R, out=np.full(len(total_R), np.nan), where=num_splits_R > 0))


def _redrawn(num_users: int, samples: int, seed: int) -> Iterator[FloatArray]:
    """How often each user is drawn, with replacement."""
    generator = np.random.default_rng(seed)
    for part in chunks(samples, max(1, CHUNK_VALUES // num_users)):
        drawn_RI = generator.integers(0, num_users, (len(part), num_users))
        flat = (np.arange(len(part))[:, None] * num_users + drawn_RI).ravel()
        yield np.bincount(flat, minlength=len(part) * num_users).reshape(len(part), num_users).astype(np.float64)


def randomization_test(differences: Mapping[str, FloatArray], seed: int, draws: int = DRAWS) -> dict[str, float]:
    """Two-sided p values of paired randomization tests (Fisher 1935): under the null hypothesis a user's two results
    could as well be exchanged. `differences` are value_IS by name; all are tested with the same exchanges.

    p is (1 + draws at least as far from 0 as what was seen) / (1 + draws), so it is never 0.
    """
    share_IM = np.stack([_shares(difference_IS) for difference_IS in differences.values()], axis=1)
    seen_M = np.abs(share_IM.sum(axis=0))
    least_M = seen_M - 1e-12 * np.abs(share_IM).sum(axis=0)  # what is equal but for rounding is as far
    generator, reached_M = np.random.default_rng(seed), np.zeros(len(differences))
    for part in chunks(draws, max(1, CHUNK_VALUES // len(share_IM))):
        sign_RI = generator.integers(0, 2, (len(part), len(share_IM))) * 2.0 - 1.0
        reached_M += (np.abs(sign_RI @ share_IM) >= least_M).sum(axis=0)
    return dict(zip(differences, ((1 + reached_M) / (1 + draws)).tolist(), strict=True))


def _shares(difference_IS: FloatArray) -> FloatArray:
    """What each user adds to the mean over splits of the mean over users."""
    counted_S = (~np.isnan(difference_IS)).sum(axis=0)
    return np.asarray(np.nansum(difference_IS / counted_S, axis=1) / difference_IS.shape[1])


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values adjusted for testing all of them (Holm 1979): reject where they are below the level."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, least = {}, 0.0
    for place, name in enumerate(ordered):
        least = max(least, min(1.0, (len(ordered) - place) * p_values[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


def compared_with(
    reference: str, values: Mapping[str, FloatArray], samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Every other method less `reference`, user by user: interval, p and Holm's p of this family of tests."""
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
    """Each method against the best of the others: everyone against the best, and the best against the second.

    The best's test is the second's with the sides changed, so it is no further test in Holm's family.
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


def coverage(item_BK: IntArray, num_items: int, k: int) -> float:
    """Share of the catalog that stands in at least one list of k."""
    top_BK = item_BK[:, :k]
    return len(np.unique(top_BK[top_BK >= 0])) / num_items


def popularity_lift(item_BK: IntArray, count_J: npt.NDArray[np.int64], k: int) -> float:
    """Mean training interactions of a recommended item over the catalog's mean: 1 is what a random draw gives."""
    top_BK = item_BK[:, :k]
    recommended, mean = count_J[top_BK[top_BK >= 0]], count_J.mean()
    return float(recommended.mean() / mean) if mean and len(recommended) else 0.0
