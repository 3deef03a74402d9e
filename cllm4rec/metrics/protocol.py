"""The evaluation protocol: which users are evaluated, what a method may read, and what it may not recommend.

The validation during training and the final test both come from here, so they cannot drift apart.
Shapes: B users, J items, K places of a ranked list.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, Self

import numpy as np
from scipy import sparse

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ragged import Ragged, chunks
from cllm4rec.metrics.ranking import METRICS, compute, rank_scores
from cllm4rec.typing import Array, Float32Array, IntArray

CHUNK_VALUES = 1 << 22
"""The largest number of values in a temporary array: 32 MiB of float64."""

Read = Literal["train", "train+validation"]


class Recommender(Protocol):
    """A fitted baseline (`cllm4rec.evaluation.baseline.Baseline` adds how it is fitted)."""

    def scores(self, users: IntArray, histories: Ragged) -> Float32Array:
        """A score for every item (dense, B × J). `users` are user indices, -1 for users unknown at training; `histories`
        are their items, oldest first. A method without user texts or tables reads the histories alone."""
        ...


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """B users with held-out items; row r of every array belongs to the same user.

    users: user indices. num_train: the number of their training items. read: the history that a method is given.
    masked: the items left out of every list. relevant: the items to find. num_dropped: users without a held-out item.
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
    """The validation after an epoch: users (or a shard of them) with validation items, whose training items are read and
    masked while the whole catalog is ranked.

    `users`, `read` and `relevant` are those of HeldOut, ordered by user; the last two are copied on first use.
    """

    def __init__(self, histories: Histories, metrics: Sequence[str] = METRICS) -> None:
        rows = np.flatnonzero(histories.validation.lengths)
        self._rows = rows[np.argsort(histories.user[rows])]
        self._histories = dataclasses.replace(histories, test=Ragged.empty(len(histories.user)))  # never tuned on
        self._names = tuple(metrics)

    def take(self, rows: IntArray) -> Self:
        """Some of the users."""
        part = copy.copy(self)
        part.__dict__.pop("_held_out", None)
        part._rows = self._rows[rows]
        return part

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

    def metrics(self, ranked_BK: Array) -> dict[str, float]:
        """Sums over the users, and their `count`: add them up over workers, then call `means`."""
        per_user = compute(ranked_BK, self.relevant, self._names)
        return {"count": float(len(self.users)), **{name: float(values.sum()) for name, values in per_user.items()}}


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """The mean of every metric from the sums of all workers; NaN if no user has a validation item."""
    count = sums["count"]
    return {name: total / count if count else float("nan") for name, total in sums.items() if name != "count"}


def interaction_matrix(items: Ragged, num_items: int) -> sparse.csr_array:
    """Users × items, 1 if the user has the item."""
    ones = np.ones(len(items.values), np.float32)
    return sparse.csr_array((ones, items.values, items.offsets), shape=(len(items), num_items))


def rank_with(
    recommender: Recommender, users: IntArray, read: Ragged, masked: Ragged, num_items: int, k: int
) -> IntArray:
    """Ranked lists (item_BK) of a fitted baseline, in chunks of users that limit the memory of dense scores."""
    ranked = [
        rank_scores(recommender.scores(users[rows], read.take(rows)), masked.take(rows), k)[0]
        for rows in chunks(len(read), max(1, CHUNK_VALUES // num_items))
    ]
    return np.concatenate([np.empty((0, k), np.int64), *ranked])
