"""Documents → batches of fixed shape, as plain arrays: which token stands in which slot and what is predicted where.

A batch is one grid of slots for a decoder (documents end to end in one row, each seeing only itself), or two for an
encoder-decoder (prompt and main text, one document a row).

Lengths: D documents, R rows × T columns = S slots of a grid, P predictions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm4rec.arrays.ids import NOBODY, TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind

Array = npt.NDArray[Any]

_LOOK_PAST = 16
"""A batch is full when so many documents have been found too long for what room is left."""


class Table(IntEnum):
    """Where the embedding of a token is read: the word embeddings or one of the four ID tables."""

    WORDS = 0
    COLLABORATIVE_USERS = 1
    COLLABORATIVE_ITEMS = 2
    CONTENT_USERS = 3
    CONTENT_ITEMS = 4


USER_TABLES = (Table.COLLABORATIVE_USERS, Table.CONTENT_USERS)


@dataclasses.dataclass(frozen=True)
class Grid:
    """R × T slots. `segment_RT` numbers the documents of a row from 1 (0 is padding), `position_RT` restarts in each.

    `lookups[table]` says which slots take which rows of which table; slots read nowhere hold the zero vector.
    """

    segment_RT: Array
    position_RT: Array
    lookups: dict[Table, tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one forward pass needs. Slots index the flattened last grid.

    item_slots[p] predicts, for every t with item_target_rows[t] == p, the item item_targets[t].
    word_slots[w] predicts the word word_targets[w].
    penalty_*: the distinct IDs of each document, summed over documents (id ascending, times): all that the batch reads.
    """

    grids: tuple[Grid, ...]
    item_slots: Array
    item_target_rows: Array
    item_targets: Array
    word_slots: Array
    word_targets: Array
    distinct_users: Array
    distinct_user_counts: Array
    distinct_items: Array
    distinct_item_counts: Array
    num_documents: int
    num_users: int
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Packer:
    """Documents end to end, for models that read one sequence (GPT-2, Llama)."""

    token_space: TokenSpace
    num_slots: int
    max_tokens: int
    """Of a document: what the model has positions for. At most `num_slots`."""

    def __post_init__(self) -> None:
        if self.num_slots < self.max_tokens:
            raise ValueError(f"{self.num_slots} slots cannot hold a document of {self.max_tokens} tokens")

    def batches(self, parts: Iterable[Documents]) -> Iterator[Batch]:
        """All documents, in order but for small ones that fill gaps, however they are parted. Batches have one shape.

        Raises ValueError for a document longer than `max_tokens`.
        """
        held = nothing()
        for part in parts:
            self._refuse_long(part)
            held = Documents.concat([held, part])
            groups, left = fill(held.lengths, self.num_slots, more=True)
            yield from self._laid_out(held, groups)
            held = held.take(left)
        groups, _ = fill(held.lengths, self.num_slots)
        yield from self._laid_out(held, groups)

    def _laid_out(self, documents: Documents, groups: list[Array]) -> Iterator[Batch]:
        for chosen in groups:
            yield self.layout(documents.take(chosen))

    def layout(self, documents: Documents) -> Batch:
        """One batch of all of them, which fit."""
        sequence = Ragged.interleave(documents.prompt, documents.main)
        slots = np.arange(len(sequence.values))
        first_main = documents.prompt.lengths[sequence.rows]
        is_main = sequence.places >= first_main
        # The first main token is predicted from the prompt's last position (method.md, heads).
        predicted = Ragged(slots[is_main] - 1, documents.main.offsets)
        grid = _grid((1, self.num_slots), slots, sequence, sequence.rows + 1, documents, self.token_space)
        return _batch((grid,), documents, predicted, sequence.offsets[1:] - 1, self.token_space)

    def empty(self) -> Batch:
        """Padding only: what a worker runs when its documents are used up and the others still step."""
        return self.layout(nothing())

    def _refuse_long(self, documents: Documents) -> None:
        longest = _longest(documents.lengths)
        if longest > self.max_tokens:
            raise ValueError(f"a document has {longest} tokens; raise model.max_tokens {self.max_tokens}")


@dataclasses.dataclass(frozen=True)
class PairPacker:
    """One document a row, prompt in the encoder and main text in the decoder (T5), grouped by length."""

    token_space: TokenSpace
    num_slots: int
    start_token: int

    def batches(self, parts: Iterable[Documents]) -> Iterator[Batch]:
        """Batches of similar lengths within windows of 32 batches, so that padding stays small and order stays random."""
        for documents in parts:
            yield from self._windows(documents)

    def _windows(self, documents: Documents) -> Iterator[Batch]:
        window = max(1, 32 * self.num_slots // max(1, int(documents.lengths.mean()) if len(documents) else 1))
        for begin in range(0, len(documents), window):
            rows = np.arange(begin, min(begin + window, len(documents)))
            by_length = rows[np.lexsort((documents.prompt.lengths[rows], documents.main.lengths[rows]))]
            groups = list(self._groups(documents, by_length))
            for number in np.random.default_rng(begin).permutation(len(groups)):
                yield self.layout(documents.take(groups[number]))

    def layout(self, documents: Documents, shape: tuple[int, int, int] | None = None) -> Batch:
        """`shape`: rows, encoder columns, decoder columns; by default the longest decide."""
        num_documents = len(documents)
        decoder_lengths = np.maximum(1, documents.main.lengths)
        longest = (num_documents, _longest(documents.prompt.lengths), _longest(decoder_lengths))
        num_rows, encoder_columns, decoder_columns = shape or longest
        every = np.arange(num_documents)
        prompt = documents.prompt
        encoder_slots = prompt.rows * encoder_columns + prompt.places
        encoder = _grid(
            (num_rows, encoder_columns), encoder_slots, prompt, np.ones_like(prompt.rows), documents, self.token_space
        )
        # The decoder reads the start token, then the main text without its last token.
        reads = Ragged.interleave(
            Ragged(np.full(num_documents, self.start_token, np.int32), np.arange(num_documents + 1)), documents.main
        )
        reads = reads.where(reads.places < decoder_lengths[reads.rows])
        decoder_slots = reads.rows * decoder_columns + reads.places
        decoder = _grid(
            (num_rows, decoder_columns), decoder_slots, reads, np.ones_like(reads.rows), documents, self.token_space
        )
        main = documents.main
        predicted = Ragged(main.rows * decoder_columns + main.places, main.offsets)
        return _batch((encoder, decoder), documents, predicted, every * decoder_columns, self.token_space)

    def empty(self) -> Batch:
        return self.layout(nothing(), (1, 1, 1))

    def _groups(self, documents: Documents, rows: Array) -> Iterator[Array]:
        begin = 0
        widest_prompt = widest_main = 0
        prompt, main = documents.prompt.lengths[rows].tolist(), documents.main.lengths[rows].tolist()
        for place in range(len(rows)):
            wider_prompt, wider_main = max(widest_prompt, prompt[place]), max(widest_main, main[place], 1)
            if place > begin and (place + 1 - begin) * (wider_prompt + wider_main) > self.num_slots:
                yield rows[begin:place]
                begin, wider_prompt, wider_main = place, prompt[place], max(main[place], 1)
            widest_prompt, widest_main = wider_prompt, wider_main
        if begin < len(rows):
            yield rows[begin:]


def fill(lengths: Array, num_slots: int, more: bool = False) -> tuple[list[Array], Array]:
    """Documents of each batch by first fit, and what is left, in its order. No length is above `num_slots`.

    A document that does not fit waits for the next batch, of which it is the first. Nothing is left but with `more` to
    come: then a batch that these documents cannot fill is not begun.
    """
    batches: list[Array] = []
    waiting: list[int] = list(range(len(lengths)))[::-1]
    size = lengths.tolist()
    while waiting:
        room = num_slots
        placed: list[int] = []
        looked_at: list[int] = []
        too_long: list[int] = []
        while waiting and room and len(too_long) < _LOOK_PAST:
            document = waiting.pop()
            looked_at.append(document)
            if size[document] > room:
                too_long.append(document)
                continue
            placed.append(document)
            room -= size[document]
        if more and room and len(too_long) < _LOOK_PAST:
            return batches, np.array(looked_at, np.int64)
        waiting.extend(reversed(too_long))
        batches.append(np.array(placed, np.int64))
    return batches, np.empty(0, np.int64)


def nothing() -> Documents:
    empty, zero = np.empty(0, np.int64), Ragged(np.empty(0, np.int32), np.zeros(1, np.int64))
    return Documents(empty.astype(np.int8), empty, empty, zero, zero, zero)


def _longest(lengths: Array) -> int:
    return int(lengths.max()) if len(lengths) else 1


def _grid(
    shape: tuple[int, int],
    slots: Array,
    sequence: Ragged,
    segments: Array,
    documents: Documents,
    token_space: TokenSpace,
) -> Grid:
    segment, position = np.zeros(shape[0] * shape[1], np.int32), np.zeros(shape[0] * shape[1], np.int64)
    segment[slots], position[slots] = segments, sequence.places
    is_text = np.isin(documents.kind, [int(kind) for kind in TEXT_KINDS])[sequence.rows]
    return Grid(segment.reshape(shape), position.reshape(shape), _lookups(sequence.values, slots, is_text, token_space))


def _lookups(token: Array, slots: Array, is_text: Array, token_space: TokenSpace) -> dict[Table, tuple[Array, Array]]:
    """Which slots read which rows: text documents read IDs through the content tables, the others the collaborative."""
    is_user, is_item = token_space.is_user(token), token_space.is_item(token)
    user_rows, item_rows = token_space.user_index(token), token_space.item_index(token)
    picks = {
        Table.WORDS: (token_space.is_word(token), token),
        Table.COLLABORATIVE_USERS: (is_user & ~is_text, user_rows),
        Table.COLLABORATIVE_ITEMS: (is_item & ~is_text, item_rows),
        Table.CONTENT_USERS: (is_user & is_text, user_rows),
        Table.CONTENT_ITEMS: (is_item & is_text, item_rows),
    }
    return {table: (slots[pick].astype(np.int64), rows[pick].astype(np.int64)) for table, (pick, rows) in picks.items()}


def _batch(
    grids: tuple[Grid, ...], documents: Documents, predicted: Ragged, last_slots: Array, token_space: TokenSpace
) -> Batch:
    """`predicted`: for every main token the slot that predicts it; `last_slots`: for every document where targets are."""
    kind = documents.kind[documents.main.rows]
    is_item = kind == Kind.INTERACTIONS
    next_items = token_space.item_index(documents.main.values[is_item].astype(np.int64))
    is_recommendation = documents.kind == Kind.RECOMMENDATION
    targets = documents.target
    target_rows = np.cumsum(is_recommendation)[targets.rows] - 1 + len(next_items)
    users, user_counts, items, item_counts = _penalty(documents, token_space)
    return Batch(
        grids=grids,
        item_slots=np.concatenate([predicted.values[is_item], last_slots[is_recommendation]]).astype(np.int64),
        item_target_rows=np.concatenate([np.arange(len(next_items)), target_rows]).astype(np.int64),
        item_targets=np.concatenate([next_items, targets.values]).astype(np.int64),
        word_slots=predicted.values[~is_item].astype(np.int64),
        word_targets=documents.main.values[~is_item].astype(np.int64),
        distinct_users=users,
        distinct_user_counts=user_counts,
        distinct_items=items,
        distinct_item_counts=item_counts,
        num_documents=len(documents),
        num_users=int(np.isin(documents.kind, [Kind.INTERACTIONS, Kind.RECOMMENDATION]).sum()),
        num_tokens=int(documents.lengths.sum()),
    )


def _penalty(documents: Documents, token_space: TokenSpace) -> tuple[Array, Array, Array, Array]:
    """The distinct users and items of each document, counted over documents (Eq. 7, 8, 10)."""
    sequence = Ragged.interleave(documents.prompt, documents.main)
    token = np.concatenate(
        [sequence.values.astype(np.int64), token_space.item_token(documents.target.values.astype(np.int64))]
    )
    document = np.concatenate([sequence.rows, documents.target.rows])
    is_id = (token != NOBODY) & ~token_space.is_word(token)
    span = token_space.num_words + token_space.num_users + token_space.num_items
    distinct = np.unique(document[is_id] * span + token[is_id]) % span
    ids, counts = np.unique(distinct, return_counts=True)
    is_user = token_space.is_user(ids)
    return (
        token_space.user_index(ids[is_user]),
        counts[is_user],
        token_space.item_index(ids[~is_user]),
        counts[~is_user],
    )
