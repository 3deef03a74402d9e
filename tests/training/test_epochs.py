import numpy as np
import pytest
from support.parity import MAX_TOKENS, all_kinds, parity

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.arrays.random import hash_uniform
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind
from cllm4rec.training import epochs
from cllm4rec.training.epochs import DocumentSource, EpochBuilder


@pytest.fixture
def builder() -> EpochBuilder:
    return EpochBuilder(parity().prompts, parity().token_space, MAX_TOKENS, seed=3)


@pytest.fixture
def source() -> Documents:
    return parity().documents.of_kinds([Kind.INTERACTIONS])


def items_of(documents: Documents, part: Ragged) -> list[list[int]]:
    token_space = parity().token_space
    return [
        sorted(token_space.item_index(row[token_space.is_item(row)]).tolist())
        for row in (part[n] for n in range(len(part)))
    ]


def test_reordering_keeps_the_items_and_changes_their_order_each_epoch(builder, source):
    first = builder.interactions(source, 0, reorder=True, user_dropout=0.0)
    second = builder.interactions(source, 1, reorder=True, user_dropout=0.0)
    assert items_of(first, first.main) == items_of(source, source.main)
    assert (first.main.values != source.main.values).mean() > 0.5
    assert (first.main.values != second.main.values).mean() > 0.5


def test_an_epoch_does_not_depend_on_which_users_a_worker_holds(builder, source):
    options = {"mask_range": (0.1, 0.9), "all_targets": False, "user_dropout": 0.5}
    everyone = builder.recommendations(source, 4, **options)
    users = np.array([7, 3, 21])
    shard = builder.recommendations(source.take(users), 4, **options)
    assert shard.prompt.tolist() == everyone.prompt.take(users).tolist()
    assert shard.target.tolist() == everyone.target.take(users).tolist()


def test_held_out_items_and_prompt_are_a_partition_of_the_history(builder, source):
    made = builder.recommendations(source, 0, mask_range=(0.2, 0.2), all_targets=False, user_dropout=0.0)
    read, held, history = items_of(made, made.prompt), made.target.tolist(), items_of(source, source.main)
    assert [sorted(prompt + target) for prompt, target in zip(read, held, strict=True)] == history
    assert {len(row) for row in held} == {2}  # 20 % of 8 items, rounded


def test_all_targets_are_the_whole_history(builder, source):
    made = builder.recommendations(source, 0, mask_range=(0.2, 0.2), all_targets=True, user_dropout=0.0)
    assert [sorted(row) for row in made.target.tolist()] == items_of(source, source.main)


def test_a_single_item_is_held_out_and_leaves_an_empty_prompt(builder):
    token_space = parity().token_space
    single = parity().prompts.interactions(token_space, np.array([5]), Ragged.from_lists([[3]]))
    made = builder.recommendations(single, 0, mask_range=(0.0, 0.0), all_targets=False, user_dropout=0.0)
    assert made.target.tolist() == [[3]]
    assert not token_space.is_item(made.prompt.values).any()


def test_a_long_history_is_cut_to_fit_the_row_and_keeps_its_prompt(source):
    short = EpochBuilder(parity().prompts, parity().token_space, 16, seed=0)
    made = short.recommendations(source, 0, mask_range=(0.1, 0.1), all_targets=True, user_dropout=0.0)
    assert made.lengths.max() == 16
    assert (made.prompt[0][-2:] == parity().prompts.will_interact[-2:]).all()
    assert {len(row) for row in made.target.tolist()} == {8}


def test_user_dropout_hides_about_its_fraction_and_other_users_in_each_epoch(source, builder):
    hidden = [
        [row[0] < 0 for row in builder.interactions(source, epoch, reorder=True, user_dropout=0.5).prompt.tolist()]
        for epoch in range(20)
    ]
    assert 0.4 < np.mean(hidden) < 0.6
    assert hidden[0] != hidden[1]


def test_hidden_users_are_in_random_order_too():
    made = all_kinds(user_dropout=1.0).of_kinds([Kind.INTERACTIONS])
    assert (np.diff(made.user) < 0).any()  # equal hashes would leave them in order


def test_text_sampling_takes_about_its_fraction_and_other_texts_in_each_epoch(builder):
    documents = parity().documents
    full = builder.text_rows(documents, 0, 1.0)
    first, second = builder.text_rows(documents, 0, 0.3), builder.text_rows(documents, 1, 0.3)
    assert set(documents.kind[full]) == set(TEXT_KINDS)
    assert len(full) == (documents.kind != Kind.INTERACTIONS).sum()
    assert 0.2 < len(first) / len(full) < 0.4
    assert set(first) < set(full)
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("at_once", [1, 7, 10_000])
def test_an_epoch_does_not_depend_on_its_chunks_or_on_the_storage_order(builder, monkeypatch, at_once):
    documents = parity().documents
    options = {"mask_range": (0.2, 0.6), "all_targets": False, "user_dropout": 0.5}

    def stream(stored):
        sources = [
            DocumentSource(
                stored.rows_of([Kind.INTERACTIONS]),
                lambda subset: builder.recommendations(subset, 3, **options),
                Kind.RECOMMENDATION,
            ),
            DocumentSource(builder.text_rows(stored, 3, 0.5), lambda subset: subset),
        ]
        return list(builder.iter_documents(stored, sources, 3))

    (whole,) = stream(documents)
    sources = documents.of_kinds([Kind.INTERACTIONS]), documents.take(builder.text_rows(documents, 3, 0.5))
    expected = Documents.concat([builder.recommendations(sources[0], 3, **options), sources[1]])
    assert whole.in_order().to_arrow().equals(expected.in_order().to_arrow())
    monkeypatch.setattr(epochs, "_MADE_AT_ONCE", at_once)
    streamed = stream(documents.take(np.random.default_rng(0).permutation(len(documents))))
    assert max(map(len, streamed)) <= at_once
    made = Documents.concat(streamed)
    assert made.to_arrow().equals(whole.to_arrow())
    assert made.target.tolist() == whole.target.tolist()


def test_random_numbers_are_uniform_and_a_function_of_every_argument():
    keys = np.arange(100_000)
    drawn = hash_uniform(0, 0, 0, keys)
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.02
    for other in (
        hash_uniform(1, 0, 0, keys),
        hash_uniform(0, 1, 0, keys),
        hash_uniform(0, 0, 1, keys),
        hash_uniform(0, 0, 0, keys + 1),
    ):
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.02
