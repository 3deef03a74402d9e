"""What changes from epoch to epoch: the order of a user's items, the held-out part, a hidden user, the order of documents.

Every choice is a hash of (seed, epoch, user, item), never the state of a generator. So it does not matter which worker
holds a user, in which block it arrived, or whether the run was interrupted: epoch 7 is epoch 7.

`source` is always the interaction documents of `prepared/documents` (a row a user, train items as main text).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged, offsets_of
from cllm4rec.arrays.random import Stream, hash_uniform
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind, Prompts

Array = npt.NDArray[Any]

_MADE_AT_ONCE = 65_536


@dataclasses.dataclass(frozen=True)
class DocumentSource:
    """What an epoch makes of some documents, one of each: `make` turns any of those at `rows` into new ones of `kind`.

    Without a `kind` they keep their own.
    """

    rows: npt.NDArray[np.int64]
    make: Callable[[Documents], Documents]
    kind: Kind | None = None


@dataclasses.dataclass(frozen=True)
class EpochBuilder:
    """Makes an epoch's documents. `max_tokens` bounds a document: of a longer history a random part is read."""

    prompts: Prompts
    token_space: TokenSpace
    max_tokens: int
    seed: int

    @property
    def max_items(self) -> int:
        """Most items a prompt can hold."""
        return self.max_tokens - self.prompts.overhead()

    def interactions(self, source: Documents, epoch: int, *, reorder: bool, user_dropout: float) -> Documents:
        """`<user> has interacted with` → items, in a new random order (method.md, stochastic item reordering)."""
        items = self._items(source)
        if reorder:
            items = self._shuffled(items, source.user, epoch, Stream.ORDER)
        hidden = self._hidden(source.user, epoch, user_dropout)
        return self.prompts.interactions(self.token_space, source.user, _first(items, self.max_items), hidden)

    def recommendations(
        self, source: Documents, epoch: int, *, mask_range: tuple[float, float], all_targets: bool, user_dropout: float
    ) -> Documents:
        """Hold out a random part of each user's items, put the rest in the prompt (method.md, finetuning).

        `mask_range` bounds the held-out fraction, drawn for each user; at least one item is held out. Targets are the
        held-out items, or with `all_targets` every item of the user.
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

    def text_rows(self, documents: Documents, epoch: int, fraction: float) -> npt.NDArray[np.int64]:
        """Where the text documents are, or a random `fraction` of them, a new one each epoch."""
        rows = documents.rows_of(TEXT_KINDS)
        if fraction >= 1.0:
            return rows
        keys = (documents.kind[rows], documents.user[rows], documents.item[rows])
        return rows[hash_uniform(self.seed, epoch, Stream.SAMPLE, *keys) < fraction]

    def iter_documents(self, documents: Documents, parts: Sequence[DocumentSource], epoch: int) -> Iterator[Documents]:
        """What is made of all parts, in the epoch's order, some at a time: an epoch is never whole in memory."""
        rows = np.concatenate([part.rows for part in parts])
        part_of = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
        kinds = [
            documents.kind[part.rows] if part.kind is None else np.full(len(part.rows), part.kind) for part in parts
        ]
        order = self._order(np.concatenate(kinds), documents.user[rows], documents.item[rows], epoch)
        for begin in range(0, len(order), _MADE_AT_ONCE):
            some = order[begin : begin + _MADE_AT_ONCE]
            by_part = np.argsort(part_of[some], kind="stable")
            made = [part.make(documents.take(rows[some[part_of[some] == number]])) for number, part in enumerate(parts)]
            yield Documents.concat(made).take(np.argsort(by_part))

    def _order(self, kind: Array, user: Array, item: Array, epoch: int) -> Array:
        """By a hash; where two are equal, as the documents' names say, not as they happen to lie."""
        return np.lexsort((item, user, kind, hash_uniform(self.seed, epoch, Stream.SHUFFLE, kind, user, item)))

    def _items(self, source: Documents) -> Ragged:
        return Ragged(self.token_space.item_index(source.main.values).astype(np.int64), source.main.offsets)

    def _shuffled(self, items: Ragged, user: npt.NDArray[Any], epoch: int, stream: int) -> Ragged:
        place = hash_uniform(self.seed, epoch, stream, user[items.rows], items.values)
        return Ragged(items.values[np.lexsort((place, items.rows))], items.offsets)

    def _hidden(self, user: npt.NDArray[Any], epoch: int, chance: float) -> npt.NDArray[np.bool_]:
        return hash_uniform(self.seed, epoch, Stream.HIDE, user) < chance


def _first(items: Ragged, most: int) -> Ragged:
    if len(items) == 0 or items.lengths.max() <= most:
        return items
    kept = items.places < most
    return Ragged(items.values[kept], offsets_of(np.minimum(items.lengths, most)))
