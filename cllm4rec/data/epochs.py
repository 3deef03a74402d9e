"""What changes from epoch to epoch: the order of a user's items, the held-out part, a hidden user, the order of documents.

Every choice is a hash of (seed, epoch, user, item), never the state of a generator. So it does not matter which worker
holds a user, in which block it arrived, or whether the run was interrupted: epoch 7 is epoch 7.

`source` is always the interaction documents of `prepared/documents` (a row a user, train items as main text).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm4rec.catalog import TokenSpace
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind, Prompts
from cllm4rec.data.ragged import Ragged, offsets_of

_ORDER, _HOLD_OUT, _FRACTION, _HIDE, _SAMPLE, _SHUFFLE = range(6)  # one stream of random numbers for each purpose


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes an epoch's documents. `max_tokens` bounds a document: of a longer history a random part is read."""

    prompts: Prompts
    tokens: TokenSpace
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
            items = self._shuffled(items, source.user, epoch, _ORDER)
        hidden = self._hidden(source.user, epoch, user_dropout)
        return self.prompts.interactions(self.tokens, source.user, _first(items, self.max_items), hidden)

    def recommendations(
        self, source: Documents, epoch: int, *, mask_range: tuple[float, float], all_targets: bool, user_dropout: float
    ) -> Documents:
        """Hold out a random part of each user's items, put the rest in the prompt (method.md, finetuning).

        `mask_range` bounds the held-out fraction, drawn for each user; at least one item is held out. Targets are the
        held-out items, or with `all_targets` every item of the user.
        """
        items = self._shuffled(self._items(source), source.user, epoch, _HOLD_OUT)
        low, high = mask_range
        fraction = low + (high - low) * uniform(self.seed, epoch, _FRACTION, source.user)
        num_held = np.maximum(1, np.rint(fraction * items.lengths)).astype(np.int64)
        is_held = items.places < num_held[items.rows]
        target = items if all_targets else items.where(is_held)
        return self.prompts.recommendation(
            self.tokens,
            source.user,
            _first(items.where(~is_held), self.max_items),
            target,
            self._hidden(source.user, epoch, user_dropout),
        )

    def texts(self, documents: Documents, epoch: int, fraction: float) -> Documents:
        """The text documents, or a random `fraction` of them, a new one each epoch."""
        texts = documents.of_kinds(TEXT_KINDS)
        if fraction >= 1.0:
            return texts
        drawn = uniform(self.seed, epoch, _SAMPLE, texts.kind, texts.user, texts.item) < fraction
        return texts.take(np.flatnonzero(drawn))

    def shuffled(self, documents: Documents, epoch: int) -> Documents:
        """The same documents in the epoch's order."""
        place = uniform(self.seed, epoch, _SHUFFLE, documents.kind, documents.user, documents.item)
        return documents.take(np.argsort(place, kind="stable"))

    def _items(self, source: Documents) -> Ragged:
        return Ragged(self.tokens.item_index(source.main.values).astype(np.int64), source.main.offsets)

    def _shuffled(self, items: Ragged, user: npt.NDArray[Any], epoch: int, stream: int) -> Ragged:
        place = uniform(self.seed, epoch, stream, user[items.rows], items.values)
        return Ragged(items.values[np.lexsort((place, items.rows))], items.offsets)

    def _hidden(self, user: npt.NDArray[Any], epoch: int, chance: float) -> npt.NDArray[np.bool_]:
        return uniform(self.seed, epoch, _HIDE, user) < chance


def interaction_source(documents: Documents) -> Documents:
    return documents.of_kinds([Kind.INTERACTIONS])


def uniform(seed: int, epoch: int, stream: int, *keys: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), one for each entry of the keys, a function of all arguments alone (splitmix64, Steele 2014)."""
    state = _mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) ^ _mix(np.uint64(epoch * 64 + stream)))
    mixed = np.full(np.shape(keys[0]), state, np.uint64)
    for key in keys:
        mixed = _mix(mixed ^ np.asarray(key).astype(np.int64).astype(np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: Any) -> Any:
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def _first(items: Ragged, most: int) -> Ragged:
    if len(items) == 0 or items.lengths.max() <= most:
        return items
    kept = items.places < most
    return Ragged(items.values[kept], offsets_of(np.minimum(items.lengths, most)))
