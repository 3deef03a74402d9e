"""Documents → batches of fixed shape, as plain arrays: which token stands in which slot and what is predicted where.

A batch is one grid of slots for a decoder (many documents in a row, each seeing only itself), or two for an
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

from cllm4rec.catalog import NOBODY, TokenSpace
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind
from cllm4rec.data.ragged import Ragged, offsets_of

Array = npt.NDArray[Any]
Group = tuple[Array, Array, Array]
"""Documents of one batch, the row of each and its first column."""


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

    `reads[table]` says which slots take which rows of which table; slots read nowhere hold the zero vector.
    """

    segment_RT: Array
    position_RT: Array
    reads: dict[Table, tuple[Array, Array]]


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
    penalty_users: Array
    penalty_user_counts: Array
    penalty_items: Array
    penalty_item_counts: Array
    num_documents: int
    num_users: int
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Packer:
    """Many documents a row, for models that read one sequence (GPT-2, Llama)."""

    tokens: TokenSpace
    num_rows: int
    num_columns: int

    def batches(self, parts: Iterable[Documents]) -> Iterator[Batch]:
        """All documents, in order but for small ones that fill gaps, however they are parted. Batches have one shape.

        Raises ValueError for a document longer than a row.
        """
        held = nothing()
        for part in parts:
            held = Documents.concat([held, part])
            groups, left = fill_rows(held.lengths, self.num_rows, self.num_columns, more=True)
            yield from self._laid_out(held, groups)
            held = held.take(left)
        groups, _ = fill_rows(held.lengths, self.num_rows, self.num_columns)
        yield from self._laid_out(held, groups)

    def _laid_out(self, documents: Documents, groups: list[Group]) -> Iterator[Batch]:
        for chosen, rows, starts in groups:
            yield self.layout(documents.take(chosen), rows, starts)

    def layout(self, documents: Documents, rows: Array, starts: Array) -> Batch:
        """Document d begins in row `rows[d]` at column `starts[d]`."""
        sequence = Ragged.interleave(documents.prompt, documents.main)
        slots = (rows * self.num_columns + starts)[sequence.rows] + sequence.places
        first_main = documents.prompt.lengths[sequence.rows]
        is_main = sequence.places >= first_main
        # The first main token is predicted from the prompt's last position (method.md, heads).
        predicted = Ragged(slots[is_main] - 1, documents.main.offsets)
        last_slots = rows * self.num_columns + starts + sequence.lengths - 1
        shape = (self.num_rows, self.num_columns)
        grid = _grid(shape, slots, sequence, _segments(rows)[sequence.rows], documents, self.tokens)
        return _batch((grid,), documents, predicted, last_slots, self.tokens)

    def empty(self) -> Batch:
        """Padding only: what a worker runs when its documents are used up and the others still step."""
        none = np.empty(0, np.int64)
        return self.layout(nothing(), none, none)


@dataclasses.dataclass(frozen=True)
class PairPacker:
    """One document a row, prompt in the encoder and main text in the decoder (T5), grouped by length."""

    tokens: TokenSpace
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
            (num_rows, encoder_columns), encoder_slots, prompt, np.ones_like(prompt.rows), documents, self.tokens
        )
        # The decoder reads the start token, then the main text without its last token.
        reads = Ragged.interleave(
            Ragged(np.full(num_documents, self.start_token, np.int32), np.arange(num_documents + 1)), documents.main
        )
        reads = reads.where(reads.places < decoder_lengths[reads.rows])
        decoder_slots = reads.rows * decoder_columns + reads.places
        decoder = _grid(
            (num_rows, decoder_columns), decoder_slots, reads, np.ones_like(reads.rows), documents, self.tokens
        )
        main = documents.main
        predicted = Ragged(main.rows * decoder_columns + main.places, main.offsets)
        return _batch((encoder, decoder), documents, predicted, every * decoder_columns, self.tokens)

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


def fill_rows(lengths: Array, num_rows: int, num_columns: int, more: bool = False) -> tuple[list[Group], Array]:
    """First fit: groups of documents with the row and first column of each, and what is left, in its order.

    A document that fits nowhere waits for the next group, of which it is the first; a group closes when four documents
    a row have been turned away, so that short documents fill the gaps long ones leave. Nothing is left but with `more`
    to come: then a group that these documents cannot close is not begun.
    """
    if len(lengths) and lengths.max() > num_columns:
        raise ValueError(f"a document has {lengths.max()} tokens and a row {num_columns}; raise model.max_tokens")
    groups: list[Group] = []
    waiting: list[int] = list(range(len(lengths)))[::-1]
    size = lengths.tolist()
    while waiting:
        room = np.full(num_rows, num_columns)
        placed: list[tuple[int, int, int]] = []
        looked_at: list[int] = []
        turned_away: list[int] = []
        while waiting and len(turned_away) < 4 * num_rows:
            document = waiting.pop()
            looked_at.append(document)
            row = int(np.argmax(room >= size[document]))
            if room[row] < size[document]:
                turned_away.append(document)
                continue
            placed.append((document, row, num_columns - int(room[row])))
            room[row] -= size[document]
        if more and len(turned_away) < 4 * num_rows:
            return groups, np.array(looked_at, np.int64)
        waiting.extend(reversed(turned_away))
        chosen = np.array(placed, dtype=np.int64)
        groups.append((chosen[:, 0], chosen[:, 1], chosen[:, 2]))
    return groups, np.empty(0, np.int64)


def nothing() -> Documents:
    empty, zero = np.empty(0, np.int64), Ragged(np.empty(0, np.int32), np.zeros(1, np.int64))
    return Documents(empty.astype(np.int8), empty, empty, zero, zero, zero)


def _longest(lengths: Array) -> int:
    return int(lengths.max()) if len(lengths) else 1


def _segments(rows: Array) -> Array:
    """Number the documents of each row from 1, in the order they come."""
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows) if len(rows) else np.empty(0, np.int64)
    segments = np.empty(len(rows), np.int64)
    segments[order] = np.arange(len(rows)) - np.repeat(offsets_of(counts)[:-1], counts) + 1
    return segments


def _grid(
    shape: tuple[int, int], slots: Array, sequence: Ragged, segments: Array, documents: Documents, tokens: TokenSpace
) -> Grid:
    segment, position = np.zeros(shape[0] * shape[1], np.int32), np.zeros(shape[0] * shape[1], np.int64)
    segment[slots], position[slots] = segments, sequence.places
    is_text = np.isin(documents.kind, [int(kind) for kind in TEXT_KINDS])[sequence.rows]
    return Grid(segment.reshape(shape), position.reshape(shape), _reads(sequence.values, slots, is_text, tokens))


def _reads(token: Array, slots: Array, is_text: Array, tokens: TokenSpace) -> dict[Table, tuple[Array, Array]]:
    """Which slots read which rows: text documents read IDs through the content tables, the others the collaborative."""
    is_user, is_item = tokens.is_user(token), tokens.is_item(token)
    user_rows, item_rows = tokens.user_index(token), tokens.item_index(token)
    picks = {
        Table.WORDS: (tokens.is_word(token), token),
        Table.COLLABORATIVE_USERS: (is_user & ~is_text, user_rows),
        Table.COLLABORATIVE_ITEMS: (is_item & ~is_text, item_rows),
        Table.CONTENT_USERS: (is_user & is_text, user_rows),
        Table.CONTENT_ITEMS: (is_item & is_text, item_rows),
    }
    return {table: (slots[pick].astype(np.int64), rows[pick].astype(np.int64)) for table, (pick, rows) in picks.items()}


def _batch(
    grids: tuple[Grid, ...], documents: Documents, predicted: Ragged, last_slots: Array, tokens: TokenSpace
) -> Batch:
    """`predicted`: for every main token the slot that predicts it; `last_slots`: for every document where targets are."""
    kind = documents.kind[documents.main.rows]
    is_item = kind == Kind.INTERACTIONS
    next_items = tokens.item_index(documents.main.values[is_item].astype(np.int64))
    is_recommendation = documents.kind == Kind.RECOMMENDATION
    targets = documents.target
    target_rows = np.cumsum(is_recommendation)[targets.rows] - 1 + len(next_items)
    users, user_counts, items, item_counts = _penalty(documents, tokens)
    return Batch(
        grids=grids,
        item_slots=np.concatenate([predicted.values[is_item], last_slots[is_recommendation]]).astype(np.int64),
        item_target_rows=np.concatenate([np.arange(len(next_items)), target_rows]).astype(np.int64),
        item_targets=np.concatenate([next_items, targets.values]).astype(np.int64),
        word_slots=predicted.values[~is_item].astype(np.int64),
        word_targets=documents.main.values[~is_item].astype(np.int64),
        penalty_users=users,
        penalty_user_counts=user_counts,
        penalty_items=items,
        penalty_item_counts=item_counts,
        num_documents=len(documents),
        num_users=int(np.isin(documents.kind, [Kind.INTERACTIONS, Kind.RECOMMENDATION]).sum()),
        num_tokens=int(documents.lengths.sum()),
    )


def _penalty(documents: Documents, tokens: TokenSpace) -> tuple[Array, Array, Array, Array]:
    """The distinct users and items of each document, counted over documents (Eq. 7, 8, 10)."""
    sequence = Ragged.interleave(documents.prompt, documents.main)
    token = np.concatenate(
        [sequence.values.astype(np.int64), tokens.item_token(documents.target.values.astype(np.int64))]
    )
    document = np.concatenate([sequence.rows, documents.target.rows])
    is_id = (token != NOBODY) & ~tokens.is_word(token)
    span = tokens.num_words + tokens.num_users + tokens.num_items
    distinct = np.unique(document[is_id] * span + token[is_id]) % span
    ids, counts = np.unique(distinct, return_counts=True)
    is_user = tokens.is_user(ids)
    return (
        tokens.user_index(ids[is_user]),
        counts[is_user],
        tokens.item_index(ids[~is_user]),
        counts[~is_user],
    )
