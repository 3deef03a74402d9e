"""Sampled softmax for large catalogs: the items that a step's softmax runs over, and the chance each had to be drawn.

Each item is drawn by itself with a chance in proportion to its training interactions, so the popular ones, which make most
of the sum of exponentials, are always there. Every drawn item counts by one over its chance, which makes that sum right on
average (logQ: Bengio and Senécal 2008; Horvitz and Thompson 1952).

Lengths: J items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.random import Stream, hash_uniform
from cllm4rec.data.documents import Documents, Kind

_READ_AT_ONCE = 65_536


@dataclasses.dataclass(frozen=True)
class ItemSample:
    """Drawn items, ascending, and the logarithm of the chance of each."""

    items: npt.NDArray[np.int64]
    log_chance: npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class ItemSampler:
    """Draws for each step. A draw is a function of seed, epoch and step alone, so a resumed run sees the same."""

    chance_J: npt.NDArray[np.float64]
    seed: int

    @classmethod
    def of(cls, documents: Documents, token_space: TokenSpace, size: int | None, seed: int) -> ItemSampler | None:
        """`size` items a step on average, by how often they occur in interaction documents; None where that is all."""
        if size is None or size >= token_space.num_items:
            return None
        counts_J = np.zeros(token_space.num_items, np.int64)
        for items in _items(documents, token_space):
            counts_J += np.bincount(items, minlength=token_space.num_items)
        return cls(chances(counts_J, size), seed)

    def draw(self, epoch: int, step: int) -> ItemSample:
        every = np.arange(len(self.chance_J))
        items = np.flatnonzero(hash_uniform(self.seed, epoch, Stream.DRAW, every, np.array(step)) < self.chance_J)
        return ItemSample(items, np.log(self.chance_J[items]).astype(np.float32))


def chances(counts_J: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.float64]:
    """min(1, c · (count + 1)) with the c at which they sum to `size`, at least 1 and less than J. One item is certain."""
    weight_J = counts_J + 1.0
    descending = np.sort(weight_J)[::-1]
    # With the m largest certain, the others share what is left of `size`: take the first m at which none exceeds 1.
    certain = np.arange(size)
    rest = descending.sum() - np.concatenate([[0.0], np.cumsum(descending)[: size - 1]])
    scale = (size - certain) / rest
    chance_J: npt.NDArray[np.float64] = np.minimum(1.0, weight_J * scale[np.argmax(scale * descending[:size] <= 1.0)])
    chance_J[np.argmax(weight_J)] = 1.0
    return chance_J


def _items(documents: Documents, token_space: TokenSpace) -> Iterator[npt.NDArray[np.int64]]:
    rows = documents.rows_of([Kind.INTERACTIONS])
    for begin in range(0, len(rows), _READ_AT_ONCE):
        yield token_space.item_index(documents.main.take(rows[begin : begin + _READ_AT_ONCE]).values.astype(np.int64))
