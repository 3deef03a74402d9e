"""Initialization of item rows from texts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import BackboneSize
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.model.built_backbone import build_backbone
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.training import table_init as table_init
from cllm4rec.training.table_init import init_items_from_texts, text_components, word_counts

WOOD, TIN = [1, 2, 3], [7, 8, 9]
NUM_ITEMS, WIDTH = 6, 8


def texts(words_of: dict[int, list[int]], kind: Kind = Kind.ITEM_TEXT) -> Documents:
    """One document per item with the given tokens. All documents also have token 5."""
    item = np.array(list(words_of), np.int64)
    main = Ragged.from_lists([[5, *words] for words in words_of.values()], np.int32)
    kinds, no_user = np.full(len(item), int(kind), np.int8), np.full(len(item), -1, np.int64)
    return Documents(kinds, no_user, item, Ragged.empty(len(item)), main, Ragged.empty(len(item)))


GROUPS = texts({0: WOOD, 1: [*WOOD, 4], 2: WOOD[:2], 3: TIN, 4: [*TIN, 4]})


def components(parts: list[Documents], num_items: int = NUM_ITEMS) -> np.ndarray:
    return text_components(word_counts(parts, num_items, num_words=60), WIDTH, seed=0)


def cosine(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def test_items_described_in_the_same_words_start_close_together():
    rows = components([GROUPS])
    assert not rows[5].any()
    similarity = cosine(rows[:5])
    assert similarity[:3, :3].min() > 0 > similarity[:3, 3:].max()
    assert similarity[3, 4] > 0.5


def test_reviews_of_an_item_count_as_its_text_and_histories_do_not():
    reviews = dataclasses.replace(texts({3: TIN}, Kind.REVIEW), user=np.array([0]))
    histories = texts({3: WOOD}, Kind.INTERACTIONS)
    wooden = texts({0: WOOD, 1: WOOD, 2: TIN})
    rows = components([Documents.concat([wooden, reviews, histories])])
    similarity = cosine(rows[:4])
    assert similarity[3, 2] > 0.9 > 0 > similarity[3, 0]


def test_word_counts_do_not_depend_on_the_parts(monkeypatch):
    rng = np.random.default_rng(1)
    parts = [texts({item: list(rng.integers(0, 60, 9)) for item in range(NUM_ITEMS)}) for _ in range(7)]
    whole = word_counts([Documents.concat(parts)], NUM_ITEMS, 60).toarray()
    assert whole.sum() == 7 * NUM_ITEMS * 10
    for at_once in (0, 100, 1 << 20):
        monkeypatch.setattr(table_init, "_AT_ONCE", at_once)
        assert np.array_equal(word_counts(iter(parts), NUM_ITEMS, 60).toarray(), whole)


def test_all_dimensions_have_similar_variance():
    rng = np.random.default_rng(0)
    many = texts({item: list(rng.choice(np.arange(10, 60), 12)) for item in range(200)})
    spread = components([many], 200).std(axis=0)
    assert spread.max() < 1.5 * spread.min()


def test_texts_of_few_kinds_give_the_same_components_again():
    kinds = texts({item: WOOD if item % 2 else TIN for item in range(20)})
    first = components([kinds], 20)
    for _ in range(5):
        np.testing.assert_array_equal(components([kinds], 20), first)


def make_model() -> CLLM4Rec:
    size = BackboneSize(layers=1, width=WIDTH, heads=2, vocab_size=300)
    return CLLM4Rec(build_backbone(size, 300, 32, 0), TokenSpace(300, 4, NUM_ITEMS), std=0.3, seed=0)


def test_both_tables_start_from_texts_with_unit_length_and_other_rows_stay():
    model, initial = make_model(), make_model()
    init_items_from_texts(model, [GROUPS], seed=0)
    for table, before in (
        (model.content_items, initial.content_items),
        (model.collaborative_items, initial.content_items),
    ):
        assert torch.equal(table[5], before[5])
        assert not torch.isclose(table[:5], before[:5]).any()
        assert float(table[:5].detach().square().sum(dim=1).mean()) == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(model.content_items, model.collaborative_items)
    assert torch.equal(model.content_users, initial.content_users)


@pytest.mark.parametrize(
    "documents",
    [texts({}), texts({0: WOOD}), texts(dict.fromkeys(range(6), WOOD)), texts({0: WOOD}, Kind.INTERACTIONS)],
)
def test_all_rows_stay_random_if_texts_do_not_distinguish_items(documents):
    model = make_model()
    init_items_from_texts(model, [documents], seed=0)
    assert torch.equal(model.content_items, make_model().content_items)
    assert torch.equal(model.collaborative_items, make_model().collaborative_items)
