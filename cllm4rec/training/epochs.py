"""Builds the documents of an epoch: the order of a user's items, held-out items, hidden users, the order of documents.

Every random choice is a hash of (seed, epoch, user, item) and depends on no generator state. An epoch is therefore the same
on any worker, for any block layout, and after any interruption.

`source` always means the interaction documents of `prepared/documents`: one row per user, with the training items as main
text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged, offsets_of
from cllm4rec.arrays.random import Stream, hash_uniform
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind, Prompts
from cllm4rec.typing import Array, BoolArray, IntArray

_MADE_AT_ONCE = 65_536


@dataclasses.dataclass(frozen=True)
class DocumentSource:
    """Stored documents that an epoch uses, and how it changes them.

    rows: the stored documents.
    make: turns any subset of them into as many new documents.
    kind: of the new documents; None if `make` keeps the kind.
    """

    rows: IntArray
    make: Callable[[Documents], Documents]
    kind: Kind | None = None


@dataclasses.dataclass(frozen=True)
class EpochBuilder:
    """Builds the documents of an epoch.

    max_tokens: the longest document. Of a longer history a random part is used.
    """

    prompts: Prompts
    token_space: TokenSpace
    max_tokens: int
    seed: int

    @property
    def max_items(self) -> int:
        """The largest number of items in a document."""
        return self.max_tokens - self.prompts.overhead()

    def interactions(self, source: Documents, epoch: int, *, reorder: bool, user_dropout: float) -> Documents:
        """`<user> has interacted with` → items (docs/method.md, "How it works", 2).

        reorder: in a new random order. user_dropout: the probability that the user is hidden.
        """
        items = self._items(source)
        if reorder:
            items = self._shuffled(items, source.user, epoch, Stream.ORDER)
        hidden = self._hidden(source.user, epoch, user_dropout)
        return self.prompts.interactions(self.token_space, source.user, _first(items, self.max_items), hidden)

    def recommendations(
        self, source: Documents, epoch: int, *, mask_range: tuple[float, float], all_targets: bool, user_dropout: float
    ) -> Documents:
        """Hold out a random part of each user's items and put the rest in the prompt (docs/method.md, "How it works", 6).

        mask_range: bounds of the held-out fraction, which is drawn for each user. At least one item is held out.
        all_targets: the targets are all items of the user instead of the held-out items.
        user_dropout: the probability that the user is hidden.
        """
        items = self._shuffled(self._items(source), source.user, epoch, Stream.HOLD_OUT)
        low, high = mask_range
        fraction = low + (high - low) * hash_uniform(self.seed, epoch, Stream.FRACTION, source.user)
        num_held = np.maximum(1, np.rint(fraction * items.lengths)).astype(np.int64)
        is_held = items.places < num_held[items.rows]
        target = items if all_targets else items.where(is_held)
        return self.prompts.recommendation(
            self.token_space,
            source.user,
            _first(items.where(~is_held), self.max_items),
            target,
            self._hidden(source.user, epoch, user_dropout),
        )

    def text_rows(self, documents: Documents, epoch: int, fraction: float) -> IntArray:
        """The rows of the text documents, or of a random `fraction` of them, a new one in each epoch."""
        rows = documents.rows_of(TEXT_KINDS)
        if fraction >= 1.0:
            return rows
        keys = (documents.kind[rows], documents.user[rows], documents.item[rows])
        return rows[hash_uniform(self.seed, epoch, Stream.SAMPLE, *keys) < fraction]

    def iter_documents(
        self, documents: Documents, sources: Sequence[DocumentSource], epoch: int
    ) -> Iterator[Documents]:
        """The documents of all sources in the order of the epoch, in chunks, so that memory does not hold a whole epoch."""
        rows = np.concatenate([source.rows for source in sources])
        source_number = np.repeat(np.arange(len(sources)), [len(source.rows) for source in sources])
        kinds = [
            documents.kind[source.rows] if source.kind is None else np.full(len(source.rows), source.kind)
            for source in sources
        ]
        order = self._order(np.concatenate(kinds), documents.user[rows], documents.item[rows], epoch)
        for begin in range(0, len(order), _MADE_AT_ONCE):
            chunk = order[begin : begin + _MADE_AT_ONCE]
            by_source = np.argsort(source_number[chunk], kind="stable")
            made = [
                source.make(documents.take(rows[chunk[source_number[chunk] == number]]))
                for number, source in enumerate(sources)
            ]
            yield Documents.concat(made).take(np.argsort(by_source))

    def _order(self, kind: Array, user: Array, item: Array, epoch: int) -> Array:
        """Sort by a hash, and equal hashes by kind, user and item, so that the storage order has no influence."""
        return np.lexsort((item, user, kind, hash_uniform(self.seed, epoch, Stream.SHUFFLE, kind, user, item)))

    def _items(self, source: Documents) -> Ragged:
        return Ragged(self.token_space.item_index(source.main.values).astype(np.int64), source.main.offsets)

    def _shuffled(self, items: Ragged, user: Array, epoch: int, stream: int) -> Ragged:
        sort_key = hash_uniform(self.seed, epoch, stream, user[items.rows], items.values)
        return Ragged(items.values[np.lexsort((sort_key, items.rows))], items.offsets)

    def _hidden(self, user: Array, epoch: int, probability: float) -> BoolArray:
        return hash_uniform(self.seed, epoch, Stream.HIDE, user) < probability


def _first(items: Ragged, max_items: int) -> Ragged:
    if len(items) == 0 or items.lengths.max() <= max_items:
        return items
    is_kept = items.places < max_items
    return Ragged(items.values[is_kept], offsets_of(np.minimum(items.lengths, max_items)))
