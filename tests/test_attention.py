"""Attention in blocks equals attention under a mask over whole rows, with its gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cllm4rec.model.attention import attend, blocks_of, is_plain

CPU = torch.device("cpu")


def grid_of(lengths: list[int], num_rows: int, num_columns: int) -> np.ndarray:
    """Documents of these lengths one after another in each row, turned by a place from row to row."""
    segment_RT = np.zeros((num_rows, num_columns), np.int32)
    for row in range(num_rows):
        begin = 0
        for number, length in enumerate(np.roll(lengths, row), 1):
            if begin + length <= num_columns:
                segment_RT[row, begin : begin + length] = number
                begin += length
    return segment_RT


def states(segment_RT: np.ndarray, heads: int, key_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(segment_RT), count, segment_RT.shape[1], 4) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def masked(query, key, value, segment_RT):
    segment = torch.from_numpy(segment_RT)
    mask = (segment[:, None, :, None] == segment[:, None, None, :]).tril()
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)


@given(st.lists(st.integers(1, 90), min_size=2, max_size=40), st.integers(1, 3))
def test_every_slot_stands_in_one_block_with_its_whole_document(lengths, num_rows):
    segment_RT = grid_of(lengths, num_rows, 160)
    written = np.concatenate([block.write.numpy() for block in blocks_of(segment_RT, CPU)])
    assert sorted(written[written < segment_RT.size]) == list(range(segment_RT.size))
    for block in blocks_of(segment_RT, CPU):
        looked_at = (block.bias_BLL == 0).sum(dim=2).numpy().ravel()
        real = block.write.numpy() < segment_RT.size
        slot = block.write.numpy()[real]
        row, column = slot // 160, slot % 160
        before = [(segment_RT[r, : c + 1] == segment_RT[r, c]).sum() for r, c in zip(row, column, strict=True)]
        assert looked_at[real].tolist() == before


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("lengths", [[3, 5, 1, 7] * 8, [100, 20, 64, 65], [150, 1]])
def test_blocks_give_what_a_mask_gives(lengths, key_heads):
    segment_RT = grid_of(lengths, 3, 160)
    inputs = states(segment_RT, 4, key_heads)
    weight = torch.randn(3, 160, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = masked(*inputs, segment_RT)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    found, _ = attend(None, *inputs, None, blocks=blocks_of(segment_RT, CPU))
    found_grads = torch.autograd.grad((found * weight).sum(), inputs)
    assert torch.allclose(found, expected, atol=1e-5)
    for one, other in zip(found_grads, expected_grads, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_rows_of_one_document_need_no_blocks():
    assert is_plain(np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]]))
    assert not is_plain(np.array([[1, 2, 0]]))
    assert not is_plain(np.array([[0, 1, 1]]))
    segment_RT = np.ones((2, 9), np.int32)
    inputs = states(segment_RT, 4, 2)
    found, _ = attend(None, *inputs, None, blocks=())
    assert torch.allclose(found, masked(*inputs, segment_RT), atol=1e-6)
