import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cllm4rec.data.ragged import Ragged
from cllm4rec.model.ranking import _from_keys, merged, sortable_keys

scores = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5]), st.floats(width=32, allow_nan=False, allow_infinity=False)
)


@given(arrays(np.float32, st.tuples(st.just(3), st.integers(1, 12)), elements=scores), st.integers(1, 12))
def test_top_k_of_sortable_keys_is_a_stable_full_sort(logits, k):
    items, found = _from_keys(sortable_keys(torch.from_numpy(logits)).topk(min(k, logits.shape[1]), dim=1).values, k)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert items[:, : expected.shape[1]].tolist() == expected.tolist()
    assert (items[:, expected.shape[1] :] == -1).all()
    assert np.array_equal(found[:, : expected.shape[1]], np.take_along_axis(logits, expected, axis=1))


def test_what_is_masked_comes_out_as_missing():
    items, found = _from_keys(sortable_keys(torch.tensor([[1.0, -torch.inf, 0.5]])).topk(3, dim=1).values, 4)
    assert items.tolist() == [[0, 2, -1, -1]]
    assert np.isneginf(found[0, 2:]).all()


def test_merged_lists_are_ascending_and_distinct():
    one, other = Ragged.from_lists([[5, 1, 5], [], [2]]), Ragged.from_lists([[1, 0], [], [3]])
    assert merged(one, other).tolist() == [[0, 1, 5], [], [2, 3]]
