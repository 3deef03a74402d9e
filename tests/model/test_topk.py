import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cllm4rec.model import topk as keys
from cllm4rec.model.topk import pack_keys, stable_topk, unpack_keys

few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5])
scores = st.one_of(few_values, st.floats(width=32, allow_nan=False, allow_infinity=False))


@given(arrays(np.float32, st.tuples(st.just(3), st.integers(1, 12)), elements=scores), st.integers(1, 12))
def test_the_best_are_those_of_a_stable_full_sort(logits, k):
    items, found = unpack_keys(stable_topk(torch.from_numpy(logits), k), k)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert items[:, : expected.shape[1]].tolist() == expected.tolist()
    assert (items[:, expected.shape[1] :] == -1).all()
    assert np.array_equal(found[:, : expected.shape[1]], np.take_along_axis(logits, expected, axis=1))


@given(
    arrays(np.float32, st.tuples(st.just(2), st.integers(2, 40)), elements=few_values), st.integers(1, 12), st.data()
)
def test_parts_of_a_catalog_give_the_best_of_all(logits, k, data):
    """For any ties across parts and across the last position."""
    cut = data.draw(st.integers(1, logits.shape[1] - 1))
    parts = [stable_topk(torch.from_numpy(logits[:, :cut]), k), stable_topk(torch.from_numpy(logits[:, cut:]), k, cut)]
    together = torch.cat(parts, dim=1)
    items, _ = unpack_keys(together.topk(min(k, together.shape[1]), dim=1).values, k)
    whole, _ = unpack_keys(stable_topk(torch.from_numpy(logits), k), k)
    assert np.array_equal(items, whole)


def test_keys_of_whole_rows_are_built_only_if_a_tie_crosses_the_last_position(monkeypatch):
    shapes = []

    def recording_pack_keys(logits, items):
        shapes.append(tuple(logits.shape))
        return pack_keys(logits, items)

    monkeypatch.setattr(keys, "pack_keys", recording_pack_keys)
    logits = torch.arange(50.0).repeat(3, 1)
    logits[:, 49] = logits[:, 48]  # a tie within the list
    logits[1, 39] = logits[1, 40]  # and one across its end
    items, _ = unpack_keys(stable_topk(logits, 10), 10)
    assert items[0].tolist() == [48, 49, *range(47, 39, -1)]
    assert items[1].tolist() == [48, 49, *range(47, 40, -1), 39]
    assert shapes == [(3, 11), (1, 50)]


def test_masked_items_are_returned_as_missing():
    items, found = unpack_keys(stable_topk(torch.tensor([[1.0, -torch.inf, 0.5]]), 4), 4)
    assert items.tolist() == [[0, 2, -1, -1]]
    assert np.isneginf(found[0, 2:]).all()


@pytest.mark.parametrize("first_item", [0, 2_000_000_000])
def test_items_of_a_large_catalog_keep_their_index(first_item):
    items, _ = unpack_keys(stable_topk(torch.tensor([[0.5, -3.0, 2.0]]), 2, first_item), 2)
    assert (items - first_item).tolist() == [[2, 0]]
