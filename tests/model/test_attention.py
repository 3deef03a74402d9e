"""Attention in blocks equals attention under a mask over whole rows, in outputs and gradients."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cllm4rec.model.attention import DocumentLayout, attend
from cllm4rec.model.cpu.attention import build_blocks
from cllm4rec.model.gpu.attention import build_spans

CPU = torch.device("cpu")


def grid_of(lengths: list[int], num_rows: int, num_columns: int) -> np.ndarray:
    """Documents of these lengths, one after another in each row. Each row starts one document later."""
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


@given(st.lists(st.integers(1, 90), min_size=2, max_size=40), st.integers(1, 3), st.booleans())
def test_every_slot_is_in_one_block_with_its_whole_document(lengths, num_rows, batch_invariant):
    segment_RT = grid_of(lengths, num_rows, 160)
    segment_S = segment_RT.ravel()
    blocks = build_blocks(segment_RT, CPU, batch_invariant)
    slots = torch.arange(segment_S.size)
    gathered = torch.cat(
        [blocks.gather(slots.view(-1, 1, 1), number, 1).flatten() for number in range(len(blocks.groups))]
    )
    is_in_block = segment_S > 0 if batch_invariant else np.ones(segment_S.size, bool)
    assert (blocks.scatter(gathered[:, None], 1, 1).flatten() == slots)[is_in_block].all()
    num_attended = torch.cat([(group.bias_BLL == 0).sum(dim=2).flatten() for group in blocks.groups])
    found = blocks.scatter(num_attended[:, None], 1, 1).flatten().numpy()
    row, column = slots.numpy() // 160, slots.numpy() % 160
    expected = [(segment_RT[r, : c + 1] == segment_RT[r, c]).sum() for r, c in zip(row, column, strict=True)]
    assert (found == expected)[segment_S > 0].all()


def test_padding_is_divided_into_short_blocks():
    for segment_RT in (np.zeros((1, 4096), np.int32), grid_of([90, 30], 1, 4096)):
        blocks = build_blocks(segment_RT, CPU)
        assert max(group.bias_BLL.shape[1] for group in blocks.groups) <= 96 + 32


def test_batch_invariant_groups_of_one_length_have_one_shape():
    shapes = {
        group.bias_BLL.shape
        for lengths in ([3] * 50, [20, 30, 3], [17], [24] * 6, [21, 3] * 4)
        for group in build_blocks(grid_of(lengths, 1, 160), CPU, batch_invariant=True).groups
    }
    assert len({shape[1] for shape in shapes}) == len(shapes)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("lengths", [[3, 5, 1, 7] * 8, [100, 20, 64, 65], [150, 1]])
def test_attention_in_blocks_equals_masked_attention(lengths, key_heads, batch_invariant):
    segment_RT = grid_of(lengths, 3, 160)
    inputs = states(segment_RT, 4, key_heads)
    weight = torch.randn(3, 160, 4, 4, generator=torch.Generator().manual_seed(1))
    weight *= torch.from_numpy(segment_RT > 0)[:, :, None, None]  # outputs of padding are undefined
    expected = masked(*inputs, segment_RT)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    found, _ = attend(None, *inputs, None, layout=DocumentLayout(segment_RT, CPU, batch_invariant))
    found_grads = torch.autograd.grad((found * weight).sum(), inputs)
    assert torch.allclose(found * weight, expected * weight, atol=1e-5)
    for found_grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        assert torch.allclose(found_grad, expected_grad, atol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 5, 1, 7] * 8, [100, 20, 40], [160], [1]])
def test_attention_within_spans_equals_attention_within_documents(lengths):
    """The definition of the GPU kernel, as a plain loop over the spans."""
    segment_RT = grid_of(lengths, 1, 160)
    query, key, value = states(segment_RT, 4, 4)
    spans = build_spans(segment_RT, CPU)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end], is_causal=True
        )
        for begin, end in itertools.pairwise(spans.bounds.tolist())
    ]
    by_span = torch.cat(parts, dim=2).transpose(1, 2)
    by_block, _ = attend(None, query, key, value, None, layout=DocumentLayout(segment_RT, CPU))
    is_real = torch.from_numpy(segment_RT > 0)
    assert torch.allclose(by_span[is_real], by_block[is_real], atol=1e-5)
    assert spans.longest == max(np.diff(spans.bounds.numpy()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_gpu_agrees_with_blocks_and_gives_a_document_the_same_bits_in_any_batch(key_heads):
    device, lengths = torch.device("cuda"), [3, 5, 1, 7] * 8 + [20]
    segment_RT = grid_of(lengths, 1, 160)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, 160, 16, generator=generator) for heads in (4, key_heads, key_heads)]
    expected, _ = attend(None, *inputs, None, layout=DocumentLayout(segment_RT, CPU))
    on_gpu = [part.to(device, torch.bfloat16).requires_grad_() for part in inputs]
    found, _ = attend(None, *on_gpu, None, layout=DocumentLayout(segment_RT, device))
    is_real = torch.from_numpy(segment_RT > 0)
    assert torch.allclose(found.float().cpu()[is_real], expected[is_real], atol=0.05)
    found.float().square().mean().backward()
    assert all(bool(part.grad.isfinite().all()) for part in on_gpu)
    first = slice(0, 3)
    lone_RT = np.zeros_like(segment_RT)
    lone_RT[0, first] = 1
    lone, _ = attend(None, *on_gpu, None, layout=DocumentLayout(lone_RT, device, batch_invariant=True))
    assert torch.equal(lone[0, first], found[0, first])
