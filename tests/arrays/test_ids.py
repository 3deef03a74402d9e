"""Ids, indices and token ids: the offsets are here and nowhere else."""

import uuid

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm4rec.arrays.ids import NOBODY, Catalog, IdMap, TokenSpace, read_sizes, remap_items
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.errors import ArtifactError
from cllm4rec.storage import files

sizes = st.integers(0, 50)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(sizes, sizes, sizes)
def test_token_ids_are_words_then_users_then_items_without_a_gap(num_words, num_users, num_items):
    space = TokenSpace(num_words, num_users, num_items)
    token_space = np.concatenate(
        [np.arange(num_words), space.user_token(np.arange(num_users)), space.item_token(np.arange(num_items))]
    )
    assert token_space.tolist() == list(range(num_words + num_users + num_items))
    kinds = np.stack([space.is_word(token_space), space.is_user(token_space), space.is_item(token_space)])
    assert (kinds.sum(axis=0) == 1).all()
    assert kinds.sum(axis=1).tolist() == [num_words, num_users, num_items]


@given(sizes, st.integers(1, 50), st.integers(1, 50), st.data())
def test_indices_come_back_from_tokens(num_words, num_users, num_items, data):
    space = TokenSpace(num_words, num_users, num_items)
    users = np.array(data.draw(st.lists(st.integers(0, num_users - 1))), np.int64)
    items = np.array(data.draw(st.lists(st.integers(0, num_items - 1))), np.int64)
    assert space.user_index(space.user_token(users)).tolist() == users.tolist()
    assert space.item_index(space.item_token(items)).tolist() == items.tolist()


def test_nobody_is_no_word_user_or_item():
    space = TokenSpace(10, 5, 3)
    assert space.user_token(np.array([0, -1])).tolist() == [10, NOBODY]
    nobody = np.array([NOBODY])
    assert not space.is_word(nobody) | space.is_user(nobody) | space.is_item(nobody)


@given(st.lists(texts, unique=True, max_size=8), st.lists(texts, unique=True, max_size=8), st.data())
def test_a_catalog_comes_back_from_a_directory(user_ids, item_ids, data):
    uri = f"memory://{uuid.uuid4().hex}"
    counts = data.draw(st.lists(st.integers(0, 9), min_size=len(item_ids), max_size=len(item_ids)))
    written = Catalog(user_ids, item_ids, user_ids[::-1], item_ids[::-1], counts)
    written.save(uri)
    read = Catalog.load(uri)
    for name in ("user_ids", "item_ids", "user_texts", "item_texts", "item_counts"):
        assert list(getattr(read, name)) == list(getattr(written, name)), name
    assert [read.user_index(user_id) for user_id in user_ids] == list(range(len(user_ids)))
    assert [read.item_index(item_id) for item_id in item_ids] == list(range(len(item_ids)))
    light = Catalog.load_without_user_texts(uri)
    assert (light.user_ids.tolist(), light.user_texts) == (read.user_ids.tolist(), [""] * len(user_ids))
    assert (light.item_texts, light.item_counts.tolist()) == (read.item_texts, read.item_counts.tolist())
    assert read_sizes(uri) == (len(user_ids), len(item_ids))
    files.remove_directory(uri)


def test_what_was_unknown_at_training_has_no_row():
    catalog = Catalog(["u1"], ["i1", "i2"])
    assert (catalog.user_index("u2"), catalog.item_index("")) == (-1, -1)
    assert (catalog.user_texts, catalog.item_texts, catalog.item_counts.tolist()) == ([""], ["", ""], [0, 0])
    assert catalog.token_space(7) == TokenSpace(7, 1, 2)


FORMS = {
    "list": list,
    "numpy": lambda ids: np.array([*ids, None], object)[:-1],
    "arrow": lambda ids: pa.array(ids, pa.large_string()),
    "chunked": lambda ids: pa.chunked_array([ids[:1], ids[1:]], pa.string()),
}


@pytest.mark.parametrize("form", FORMS)
@given(st.lists(texts, unique=True, max_size=8), st.lists(texts, max_size=8))
def test_an_id_map_finds_the_index_of_every_id(form, ids, asked):
    index_of = IdMap(FORMS[form](ids))
    expected = [ids.index(one) if one in ids else -1 for one in asked]
    assert len(index_of) == len(ids)
    assert index_of(FORMS[form](asked)).tolist() == expected
    assert [index_of.one(one) for one in asked] == expected


def test_items_are_remapped_by_id_and_unknown_ones_left_out():
    index_of = IdMap(["c", "x", "a"])(["a", "b", "c"])
    assert index_of.tolist() == [2, -1, 0]
    assert remap_items(Ragged.from_lists([[0, 1, 2], [1], []]), index_of).tolist() == [[2, 0], [], []]


@pytest.mark.parametrize("name", ["users", "items"])
@pytest.mark.parametrize("read", [Catalog.load, Catalog.load_without_user_texts, read_sizes])
def test_a_missing_or_damaged_catalog_is_told_in_a_sentence(tmp_path, name, read):
    Catalog(["u1"], ["i1"]).save(str(tmp_path))
    file = tmp_path / f"{name}.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match=rf"{name}\.parquet is damaged"):
        read(str(tmp_path))
    file.unlink()
    with pytest.raises(ArtifactError, match=rf"{name}\.parquet is missing"):
        read(str(tmp_path))
