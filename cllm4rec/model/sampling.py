"""Sampled softmax for large catalogs: the items that the softmax of a step runs over, and their sampling probabilities.

Items are sampled independently, with probabilities proportional to their training interactions + 1 and capped at 1, so that
an item without any can be drawn. Popular items, which contribute most of the sum of exponentials, are nearly always
included. Each sampled item is weighted by the inverse of its probability, which makes the sum unbiased (logQ correction:
Bengio and Senécal 2008; Horvitz and Thompson 1952).

Shapes: J items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.random import Stream, hash_uniform
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.typing import Float32Array, FloatArray, IntArray

_READ_AT_ONCE = 65_536


@dataclasses.dataclass(frozen=True)
class ItemSample:
    """Sampled items, ascending, and the logarithm of the sampling probability of each."""

    items: IntArray
    log_probability: Float32Array


@dataclasses.dataclass(frozen=True)
class ItemSampler:
    """Samples items for each step. A sample depends only on seed, epoch and step, so a resumed run repeats it."""

    probability_J: FloatArray
    seed: int

    @classmethod
    def from_documents(
        cls, documents: Documents, token_space: TokenSpace, size: int | None, seed: int
    ) -> ItemSampler | None:
        """Sample by the number of occurrences in interaction documents. size: the expected number of items per step.

        Returns None, for a softmax over all items, if `size` is None or at least the size of the catalog.
        """
        if size is None or size >= token_space.num_items:
            return None
        counts_J = np.zeros(token_space.num_items, np.int64)
        for items in _items(documents, token_space):
            counts_J += np.bincount(items, minlength=token_space.num_items)
        return cls(sampling_probabilities(counts_J, size), seed)

    def draw(self, epoch: int, step: int) -> ItemSample:
        """The sample of a step."""
        item_J = np.arange(len(self.probability_J))
        draw_J = hash_uniform(self.seed, epoch, Stream.DRAW, item_J, np.array(step))
        items = np.flatnonzero(draw_J < self.probability_J)
        return ItemSample(items, np.log(self.probability_J[items]).astype(np.float32))


def sampling_probabilities(counts_J: IntArray, size: int) -> FloatArray:
    """min(1, c · (count + 1)), with c such that they sum to `size`, which is at least 1 and less than J.

    The most popular item always has probability 1, which may add up to 1 to the sum.
    """
    weight_J = counts_J + 1.0
    descending = np.sort(weight_J)[::-1]
    # If the m largest have probability 1, the rest of `size` is divided among the others. Take the smallest valid m.
    num_certain = np.arange(size)
    remaining_weight = descending.sum() - np.concatenate([[0.0], np.cumsum(descending)[: size - 1]])
    scale = (size - num_certain) / remaining_weight
    probability_J: FloatArray = np.minimum(1.0, weight_J * scale[np.argmax(scale * descending[:size] <= 1.0)])
    probability_J[np.argmax(weight_J)] = 1.0
    return probability_J


def _items(documents: Documents, token_space: TokenSpace) -> Iterator[IntArray]:
    rows = documents.rows_of([Kind.INTERACTIONS])
    for begin in range(0, len(rows), _READ_AT_ONCE):
        yield token_space.item_index(documents.main.take(rows[begin : begin + _READ_AT_ONCE]).values.astype(np.int64))
