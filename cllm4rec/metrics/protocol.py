"""The one evaluation protocol: who is evaluated, what is read, what may not be recommended, and how sure a mean is.

Training's validation and the final test both come from here, so that they cannot drift apart.
Shapes: B users, J items, K places of a ranked list.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ragged import Ragged, chunks
from cllm4rec.metrics.ranking import METRICS, compute, rank_scores
from cllm4rec.typing import FloatArray, IntArray

CONFIDENCE = 0.95
CHUNK_VALUES = 1 << 22
"""Most numbers of a temporary array: 32 MiB of float64."""

Read = Literal["train", "train+validation"]


class Recommender(Protocol):
    """What a fitted baseline is to the protocol (`cllm4rec.evaluation.baseline.Baseline` says how it is fitted)."""

    def scores(self, users: IntArray, histories: Ragged) -> npt.NDArray[np.float32]:
        """A score for every item (dense, B × J). `users` are user indices, -1 where unknown at training; `histories`
        are their items, oldest first, and all that a method without user texts or tables looks at."""
        ...


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """B users with something to find; the arrays' rows go together. `num_dropped` users had no held-out item.

    `users` are user indices and `num_train` counts their training items; `read` (the history a method is given),
    `masked` (what is left out of every list) and `relevant` (what should be found) are item indices.
    """

    users: IntArray
    num_train: IntArray
    read: Ragged
    masked: Ragged
    relevant: Ragged
    num_dropped: int

    @classmethod
    def of(cls, histories: Histories, find: str, read: Read, masked: Read) -> Self:
        """Hold out the split `find`; `read` and `masked` name the splits as `train` or `train+validation`."""
        rows = np.flatnonzero(getattr(histories, find).lengths)
        kept = histories.take(rows)
        return cls(
            users=kept.user,
            num_train=kept.train.lengths,
            read=kept.together(*read.split("+")),
            masked=kept.together(*masked.split("+")),
            relevant=getattr(kept, find),
            num_dropped=len(histories.user) - len(rows),
        )

    @classmethod
    def test(cls, histories: Histories, read: Read = "train", masked: Read = "train+validation") -> Self:
        return cls.of(histories, "test", read, masked)


class Validation:
    """What training looks at after every epoch: rank the whole catalog for users (or a shard of them) who have
    validation items, from their training items, which are also masked.

    `users`, `read` and `relevant` are as in HeldOut, in order of users; the last two are copied when they are asked for.
    """

    def __init__(self, histories: Histories, metrics: Sequence[str] = METRICS) -> None:
        rows = np.flatnonzero(histories.validation.lengths)
        self._rows = rows[np.argsort(histories.user[rows])]
        self._histories = dataclasses.replace(histories, test=Ragged.empty(len(histories.user)))  # nobody tunes on it
        self._names = tuple(metrics)

    def take(self, rows: IntArray) -> Self:
        """Some of the users."""
        some = copy.copy(self)
        some.__dict__.pop("_held_out", None)
        some._rows = self._rows[rows]
        return some

    @property
    def users(self) -> IntArray:
        return self._histories.user[self._rows]

    @property
    def read(self) -> Ragged:
        return self._held_out.read

    @property
    def relevant(self) -> Ragged:
        return self._held_out.relevant

    @functools.cached_property
    def _held_out(self) -> HeldOut:
        return HeldOut.of(self._histories.take(self._rows), "validation", "train", "train")

    def metrics(self, ranked_BK: npt.NDArray[Any]) -> dict[str, float]:
        """Sums over the users and their `count`: add these over workers, then take `means`."""
        per_user = compute(ranked_BK, self.relevant, self._names)
        return {"count": float(len(self.users)), **{name: float(values.sum()) for name, values in per_user.items()}}


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Mean of every metric from the sums of all workers; NaN where no user had a validation item."""
    count = sums["count"]
    return {name: total / count if count else float("nan") for name, total in sums.items() if name != "count"}


def interaction_matrix(items: Ragged, num_items: int) -> sparse.csr_array:
    """Users × items with 1 where a user has the item."""
    ones = np.ones(len(items.values), np.float32)
    return sparse.csr_array((ones, items.values, items.offsets), shape=(len(items), num_items))


def rank_with(
    recommender: Recommender, users: IntArray, read: Ragged, masked: Ragged, num_items: int, k: int
) -> IntArray:
    """Ranked lists (item_BK) of a fitted baseline, in chunks of users that bound the memory of dense scores."""
    ranked = [
        rank_scores(recommender.scores(users[rows], read.take(rows)), masked.take(rows), k)[0]
        for rows in chunks(len(read), max(1, CHUNK_VALUES // num_items))
    ]
    return np.concatenate([np.empty((0, k), np.int64), *ranked])


def bootstrap_interval(values_B: FloatArray, samples: int, seed: int) -> tuple[float, float]:
    """Percentile 95 % interval of the mean over users (Efron 1979): users are redrawn with replacement.

    The same seed redraws the same users whatever is measured. Raises ValueError where there are no values.
    """
    num_users = len(values_B)
    if not num_users:
        raise ValueError("there are no values to take an interval of")
    generator = np.random.default_rng(seed)
    mean_S = [
        values_B[generator.integers(0, num_users, (len(part), num_users))].mean(axis=1)
        for part in chunks(samples, max(1, CHUNK_VALUES // num_users))
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(mean_S), [tail, 1 - tail])
    return float(low), float(high)


def summarize(per_user: Mapping[str, FloatArray], samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Metric → mean over users and 95 % interval, as `metrics.json` keeps it."""
    return {name: interval(values_B, samples, seed) for name, values_B in per_user.items()}


def interval(values_B: FloatArray, samples: int, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(values_B, samples, seed)
    return {"mean": float(values_B.mean()), "low": low, "high": high}


@dataclasses.dataclass(frozen=True)
class Stratum:
    """Some users (`rows` of a HeldOut) and those of their relevant items that count, under a label for people."""

    label: str
    rows: IntArray
    relevant: Ragged

    @classmethod
    def of(cls, label: str, relevant: Ragged) -> Self:
        """The users who have a relevant item here."""
        rows = np.flatnonzero(relevant.lengths)
        return cls(label, rows, relevant.take(rows))


def history_strata(held_out: HeldOut, parts: int = 4) -> list[Stratum]:
    """Users in up to `parts` groups of nearly equal size by their number of training items."""
    lengths = held_out.num_train
    edges = np.unique(np.quantile(lengths, np.arange(parts) / parts, method="lower"))
    part_B = np.searchsorted(edges, lengths, side="right") - 1
    groups = [np.flatnonzero(part_B == part) for part in range(len(edges))]
    return [Stratum(_range_label(lengths[rows]), rows, held_out.relevant.take(rows)) for rows in groups]


def popularity_strata(held_out: HeldOut, item_counts: IntArray) -> list[Stratum]:
    """Relevant items by popularity: head, middle and tail of the catalog each hold a third of the interactions.

    A stratum without relevant items is left out.
    """
    descending = np.argsort(-item_counts, kind="stable")
    taken_before = np.cumsum(item_counts[descending]) - item_counts[descending]
    part_J = np.empty(len(item_counts), np.int64)
    part_J[descending] = np.minimum(3 * taken_before // max(int(item_counts.sum()), 1), 2)
    relevant, sizes = held_out.relevant, np.bincount(part_J, minlength=3)
    strata = [
        Stratum.of(f"{name} ({size:,} items)", relevant.where(part_J[relevant.values] == part))
        for part, (name, size) in enumerate(zip(("head", "middle", "tail"), sizes, strict=True))
    ]
    return [stratum for stratum in strata if len(stratum.rows)]


def _range_label(lengths: IntArray) -> str:
    low, high = int(lengths.min()), int(lengths.max())
    return f"{low}" if low == high else f"{low} to {high}"
