"""Packs documents into batches of fixed shape: the token of each slot, and what each slot predicts, as NumPy arrays.

A batch for a decoder is one grid of slots: documents end to end in one row, each attending only to itself. A batch for an
encoder-decoder is two grids, prompt and main text, with one document per row.

Shapes: D documents, R rows × T columns = S slots of a grid, P predictions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from enum import IntEnum

import numpy as np

from cllm4rec.arrays.ids import NOBODY, TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind
from cllm4rec.typing import Array

_MAX_SKIPPED = 16
"""A batch is full once this many documents were too long for its free slots."""


class Table(IntEnum):
    """Where the embedding of a token comes from: the word embeddings or one of the four ID tables."""

    WORDS = 0
    COLLABORATIVE_USERS = 1
    COLLABORATIVE_ITEMS = 2
    CONTENT_USERS = 3
    CONTENT_ITEMS = 4


USER_TABLES = (Table.COLLABORATIVE_USERS, Table.CONTENT_USERS)


@dataclasses.dataclass(frozen=True)
class Grid:
    """R × T slots. `segment_RT` numbers the documents of a row from 1 (0 is padding). `position_RT` restarts in each.

    lookups: for each table, slots and the table rows that they read. Slots without a lookup are padding or unknown users.
    """

    segment_RT: Array
    position_RT: Array
    lookups: dict[Table, tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """The inputs and targets of one forward pass. Slots index the flattened last grid.

    item_slots[p] predicts the item item_targets[t] for every t with item_target_rows[t] == p.
    word_slots[w] predicts the word word_targets[w].
    distinct_users, distinct_items: all users and items of the batch, ascending. Their counts are the numbers of documents in
    which they occur, the weights of the penalty.
    num_users: the number of interaction and recommendation documents.
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
    documents: Documents
    token_space: TokenSpace

    @functools.cached_property
    def read_items(self) -> Ragged:
        """For each of `item_slots`, the items of its document that stand before the prediction."""
        documents, space = self.documents, self.token_space
        is_item = (documents.kind == Kind.INTERACTIONS)[documents.main.rows]
        places = documents.main.places[is_item]
        begins = documents.main.offsets[documents.main.rows[is_item]]
        offsets = np.concatenate([[0], np.cumsum(places)])
        earlier = np.repeat(begins - offsets[:-1], places) + np.arange(offsets[-1])
        in_main = Ragged(documents.main.values[earlier], offsets)
        prompts = documents.prompt.take(np.flatnonzero(documents.kind == Kind.RECOMMENDATION))
        read = Ragged.concat([in_main, prompts.where(space.is_item(prompts.values))])
        return Ragged(space.item_index(read.values.astype(np.int64)), read.offsets)


@dataclasses.dataclass(frozen=True)
class Packer:
    """Packs documents end to end, for models that read one sequence (GPT-2, Llama)."""

    token_space: TokenSpace
    num_slots: int
    max_tokens: int
    """The longest document, limited by the positions of the model. At most `num_slots`."""

    def __post_init__(self) -> None:
        if self.num_slots < self.max_tokens:
            raise ValueError(f"{self.num_slots} slots cannot hold a document of {self.max_tokens} tokens")

    def batches(self, parts: Iterable[Documents]) -> Iterator[Batch]:
        """Batches of one shape with all documents, in order, except that short documents fill gaps of earlier batches.

        The result does not depend on how the documents are divided into parts. Raises ValueError for a document longer than
        `max_tokens`.
        """
        pending = Documents.empty()
        for part in parts:
            self._refuse_long(part)
            pending = Documents.concat([pending, part])
            groups, rest = first_fit(pending.lengths, self.num_slots, more_follow=True)
            yield from self._layouts(pending, groups)
            pending = pending.take(rest)
        groups, _ = first_fit(pending.lengths, self.num_slots)
        yield from self._layouts(pending, groups)

    def _layouts(self, documents: Documents, groups: list[Array]) -> Iterator[Batch]:
        for rows in groups:
            yield self.layout(documents.take(rows))

    def layout(self, documents: Documents) -> Batch:
        """One batch of all documents, which must fit."""
        sequence = Ragged.interleave(documents.prompt, documents.main)
        slots = np.arange(len(sequence.values))
        first_main = documents.prompt.lengths[sequence.rows]
        is_main = sequence.places >= first_main
        # The last position of the prompt predicts the first main token.
        predicted = Ragged(slots[is_main] - 1, documents.main.offsets)
        grid = _grid((1, self.num_slots), slots, sequence, sequence.rows + 1, documents, self.token_space)
        return _batch((grid,), documents, predicted, sequence.offsets[1:] - 1, self.token_space)

    def empty(self) -> Batch:
        """A batch of padding, for a worker that has no documents left while other workers still step."""
        return self.layout(Documents.empty())

    def _refuse_long(self, documents: Documents) -> None:
        longest = _longest(documents.lengths)
        if longest > self.max_tokens:
            raise ValueError(f"a document has {longest} tokens; raise model.max_tokens {self.max_tokens}")


@dataclasses.dataclass(frozen=True)
class PairPacker:
    """Packs one document per row, prompt in the encoder and main text in the decoder (T5), grouped by length."""

    token_space: TokenSpace
    num_slots: int
    start_token: int

    def batches(self, parts: Iterable[Documents]) -> Iterator[Batch]:
        """Batches of documents of similar lengths within windows of 32 batches: little padding in a random order."""
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
        """One batch of all documents. shape: rows, encoder columns, decoder columns; by default the smallest that fit."""
        num_documents = len(documents)
        decoder_lengths = np.maximum(1, documents.main.lengths)
        longest = (num_documents, _longest(documents.prompt.lengths), _longest(decoder_lengths))
        num_rows, encoder_columns, decoder_columns = shape or longest
        document_D = np.arange(num_documents)
        prompt = documents.prompt
        encoder_slots = prompt.rows * encoder_columns + prompt.places
        encoder = _grid(
            (num_rows, encoder_columns), encoder_slots, prompt, np.ones_like(prompt.rows), documents, self.token_space
        )
        # The decoder reads the start token, then the main text without its last token.
        inputs = Ragged.interleave(
            Ragged(np.full(num_documents, self.start_token, np.int32), np.arange(num_documents + 1)), documents.main
        )
        inputs = inputs.where(inputs.places < decoder_lengths[inputs.rows])
        decoder_slots = inputs.rows * decoder_columns + inputs.places
        decoder = _grid(
            (num_rows, decoder_columns), decoder_slots, inputs, np.ones_like(inputs.rows), documents, self.token_space
        )
        main = documents.main
        predicted = Ragged(main.rows * decoder_columns + main.places, main.offsets)
        return _batch((encoder, decoder), documents, predicted, document_D * decoder_columns, self.token_space)

    def empty(self) -> Batch:
        """A batch of padding, for a worker that has no documents left while other workers still step."""
        return self.layout(Documents.empty(), (1, 1, 1))

    def _groups(self, documents: Documents, rows: Array) -> Iterator[Array]:
        begin = 0
        prompt_columns = main_columns = 0
        prompt, main = documents.prompt.lengths[rows].tolist(), documents.main.lengths[rows].tolist()
        for end in range(len(rows)):
            new_prompt_columns, new_main_columns = max(prompt_columns, prompt[end]), max(main_columns, main[end], 1)
            if end > begin and (end + 1 - begin) * (new_prompt_columns + new_main_columns) > self.num_slots:
                yield rows[begin:end]
                begin, new_prompt_columns, new_main_columns = end, prompt[end], max(main[end], 1)
            prompt_columns, main_columns = new_prompt_columns, new_main_columns
        if begin < len(rows):
            yield rows[begin:]


def first_fit(lengths: Array, num_slots: int, more_follow: bool = False) -> tuple[list[Array], Array]:
    """The documents of each batch by first fit, and the documents that are in none, both in order.

    lengths: of the documents, each at most `num_slots`.
    more_follow: leave out a last batch that these documents do not fill. Otherwise every document is in a batch.

    A document that does not fit into a batch becomes the first of the next one.
    """
    batches: list[Array] = []
    waiting: list[int] = list(range(len(lengths)))[::-1]
    size = lengths.tolist()
    while waiting:
        free_slots = num_slots
        placed: list[int] = []
        visited: list[int] = []
        skipped: list[int] = []
        while waiting and free_slots and len(skipped) < _MAX_SKIPPED:
            document = waiting.pop()
            visited.append(document)
            if size[document] > free_slots:
                skipped.append(document)
                continue
            placed.append(document)
            free_slots -= size[document]
        if more_follow and free_slots and len(skipped) < _MAX_SKIPPED:
            return batches, np.array(visited, np.int64)
        waiting.extend(reversed(skipped))
        batches.append(np.array(placed, np.int64))
    return batches, np.empty(0, np.int64)


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
    """`Grid.lookups`. Text documents read IDs from the content tables, other documents from the collaborative tables."""
    is_user, is_item = token_space.is_user(token), token_space.is_item(token)
    user_rows, item_rows = token_space.user_index(token), token_space.item_index(token)
    masks_and_rows = {
        Table.WORDS: (token_space.is_word(token), token),
        Table.COLLABORATIVE_USERS: (is_user & ~is_text, user_rows),
        Table.COLLABORATIVE_ITEMS: (is_item & ~is_text, item_rows),
        Table.CONTENT_USERS: (is_user & is_text, user_rows),
        Table.CONTENT_ITEMS: (is_item & is_text, item_rows),
    }
    return {
        table: (slots[mask].astype(np.int64), rows[mask].astype(np.int64))
        for table, (mask, rows) in masks_and_rows.items()
    }


def _batch(
    grids: tuple[Grid, ...], documents: Documents, predicted: Ragged, last_slots: Array, token_space: TokenSpace
) -> Batch:
    """predicted: for each main token, the slot that predicts it. last_slots: for each document, the slot of its targets."""
    kind = documents.kind[documents.main.rows]
    is_item = kind == Kind.INTERACTIONS
    next_items = token_space.item_index(documents.main.values[is_item].astype(np.int64))
    is_recommendation = documents.kind == Kind.RECOMMENDATION
    targets = documents.target
    target_rows = np.cumsum(is_recommendation)[targets.rows] - 1 + len(next_items)
    users, user_counts, items, item_counts = _distinct_ids(documents, token_space)
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
        documents=documents,
        token_space=token_space,
    )


def _distinct_ids(documents: Documents, token_space: TokenSpace) -> tuple[Array, Array, Array, Array]:
    """Distinct users, their document counts, distinct items, their document counts (the penalty of Eq. 7, 8, 10)."""
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
