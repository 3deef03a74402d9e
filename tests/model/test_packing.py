import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.parity import MAX_TOKENS, all_kinds, parity

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.model.packing import Batch, Packer, PairPacker, Table, first_fit


def packers() -> list[Packer | PairPacker]:
    return [
        Packer(parity().token_space, 4 * MAX_TOKENS, MAX_TOKENS),
        PairPacker(parity().token_space, 4 * MAX_TOKENS, start_token=0),
    ]


def tokens_of(batch: Batch, grid_number: int) -> np.ndarray:
    """The token id of each slot (-1 for the zero vector), reconstructed from the lookups."""
    grid, space = batch.grids[grid_number], parity().token_space
    slots = np.full(grid.segment_RT.size, -1)
    for table, (table_slots, rows) in grid.lookups.items():
        offset = {Table.WORDS: 0, Table.COLLABORATIVE_USERS: space.num_words, Table.CONTENT_USERS: space.num_words}
        slots[table_slots] = rows + offset.get(table, space.num_words + space.num_users)
    return slots


@given(st.lists(st.integers(1, 32), max_size=60), st.integers(32, 100))
def test_every_document_is_in_one_batch_and_no_batch_is_overfull(lengths, num_slots):
    batches, rest = first_fit(np.array(lengths, np.int64), num_slots)
    assert all(sum(lengths[document] for document in batch) <= num_slots for batch in batches)
    assert sorted(np.concatenate([rest, *batches]).tolist()) == list(range(len(lengths)))


@given(st.lists(st.integers(1, 32), max_size=80), st.integers(32, 100), st.integers(1, 30))
def test_batches_do_not_depend_on_how_documents_are_divided_into_parts(lengths, num_slots, at_once):
    documents = of_lengths(lengths)
    parts = [
        documents.take(np.arange(begin, min(begin + at_once, len(lengths))))
        for begin in range(0, len(lengths), at_once)
    ]
    packer = DocumentNumbers(parity().token_space, num_slots, 32)
    assert list(packer.batches(parts)) == list(packer.batches([documents]))


class DocumentNumbers(Packer):
    """Returns the numbers of the documents of a batch instead of the batch."""

    def layout(self, documents):
        return documents.item.tolist()


def of_lengths(lengths: list[int]) -> Documents:
    return dataclasses.replace(
        all_kinds().take(np.zeros(len(lengths), int)),
        item=np.arange(len(lengths)),
        prompt=Ragged.from_lists([[0] * length for length in lengths], np.int32),
        main=Ragged.empty(len(lengths)),
    )


def test_short_documents_fill_the_gap_of_a_long_one_which_begins_the_next_batch():
    batches, _ = first_fit(np.array([20, 30, 20, 12, 20]), 32)
    assert [batch.tolist() for batch in batches] == [[0, 3], [1], [2], [4]]


def test_batches_of_texts_are_nearly_full():
    lengths = np.random.default_rng(0).integers(16, 192, 2000)
    for num_slots, least in ((768, 0.96), (8192, 0.99)):
        batches, _ = first_fit(lengths, num_slots)
        filled = [lengths[batch].sum() / num_slots for batch in batches[:-1]]
        assert np.mean(filled) > least


def test_a_document_longer_than_the_model_reads_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"33 tokens; raise model\.max_tokens 32"):
        list(Packer(parity().token_space, 64, 32).batches([of_lengths([33])]))


def test_a_batch_smaller_than_the_longest_document_is_refused():
    with pytest.raises(ValueError, match="31 slots cannot hold a document of 32 tokens"):
        Packer(parity().token_space, 31, 32)


@pytest.mark.parametrize("packer", packers(), ids=lambda packer: type(packer).__name__)
def test_predictions_of_an_epoch_are_exactly_the_main_tokens_and_targets(packer):
    documents = all_kinds()
    batches = list(packer.batches([documents]))
    space = parity().token_space
    is_item_kind = np.isin(documents.kind, [Kind.INTERACTIONS])
    words = documents.take(np.flatnonzero(~is_item_kind)).main.values
    items = space.item_index(documents.take(np.flatnonzero(is_item_kind)).main.values)
    assert sorted(np.concatenate([batch.word_targets for batch in batches])) == sorted(words)
    expected = sorted([*items.tolist(), *documents.target.values.tolist()])
    assert sorted(np.concatenate([batch.item_targets for batch in batches]).tolist()) == expected
    assert sum(batch.num_documents for batch in batches) == len(documents)


def test_a_token_is_predicted_from_the_slot_before_it_in_its_own_document():
    packer = packers()[0]
    for batch in packer.batches([all_kinds()]):
        grid, token_space = batch.grids[0], tokens_of(batch, 0)
        assert (token_space[batch.word_slots + 1] == batch.word_targets).all()
        segment = grid.segment_RT.ravel()
        assert (segment[batch.word_slots + 1] == segment[batch.word_slots]).all()
        assert (grid.position_RT.ravel()[batch.word_slots + 1] > 0).all()


def test_held_out_items_are_predicted_from_the_last_slot_of_their_document():
    for batch in packers()[0].batches([all_kinds().of_kinds([Kind.RECOMMENDATION])]):
        segment = np.append(batch.grids[0].segment_RT.ravel(), 0)
        assert len(batch.item_slots) == batch.num_documents
        assert segment[batch.item_slots].tolist() == list(range(1, batch.num_documents + 1))
        assert (segment[batch.item_slots + 1] != segment[batch.item_slots]).all()


def test_the_decoder_of_a_pair_reads_the_main_text_shifted_by_one():
    packer = packers()[1]
    for batch in packer.batches([all_kinds()]):
        token_space, position = tokens_of(batch, 1), batch.grids[1].position_RT.ravel()
        assert (token_space[batch.word_slots[position[batch.word_slots] == 0]] == 0).all()
        later = position[batch.word_slots] > 0
        previous = np.flatnonzero(later) - 1
        assert (token_space[batch.word_slots[later]] == batch.word_targets[previous]).all()


def test_texts_read_ids_through_content_and_the_rest_through_collaborative_tables():
    space = parity().token_space
    for kind, tables in (
        (Kind.REVIEW, {Table.CONTENT_USERS, Table.CONTENT_ITEMS}),
        (Kind.USER_TEXT, {Table.CONTENT_USERS}),
        (Kind.INTERACTIONS, {Table.COLLABORATIVE_USERS, Table.COLLABORATIVE_ITEMS}),
        (Kind.RECOMMENDATION, {Table.COLLABORATIVE_USERS, Table.COLLABORATIVE_ITEMS}),
    ):
        batch = next(iter(Packer(space, 4 * MAX_TOKENS, MAX_TOKENS).batches([all_kinds().of_kinds([kind])])))
        read = {table for table, (slots, _) in batch.grids[0].lookups.items() if len(slots)}
        assert read - {Table.WORDS} == tables


def test_penalty_counts_each_distinct_id_of_a_document_once():
    prompts, space = parity().prompts, parity().token_space
    documents = Documents.concat(
        [
            prompts.recommendation(space, np.array([4]), Ragged.from_lists([[1, 2]]), Ragged.from_lists([[2, 3]])),
            prompts.reviews(space, np.array([4]), np.array([2]), Ragged.from_lists([[0, 1]])),
            prompts.recommendation(space, np.array([-1]), Ragged.from_lists([[5]]), Ragged.from_lists([[6]])),
        ]
    )
    (batch,) = Packer(space, 2 * MAX_TOKENS, MAX_TOKENS).batches([documents])
    assert dict(zip(batch.distinct_users, batch.distinct_user_counts, strict=True)) == {4: 2}
    assert dict(zip(batch.distinct_items, batch.distinct_item_counts, strict=True)) == {1: 1, 2: 2, 3: 1, 5: 1, 6: 1}


@pytest.mark.parametrize("packer", packers(), ids=lambda packer: type(packer).__name__)
def test_an_empty_batch_predicts_nothing(packer):
    batch = packer.empty()
    assert (batch.num_documents, len(batch.item_slots), len(batch.word_slots)) == (0, 0, 0)
