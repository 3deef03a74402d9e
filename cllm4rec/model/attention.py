"""Attention among the tokens of each document, for packed rows.

A mask over whole rows makes every token meet the whole row: with documents of a dozen tokens in rows of 256, twenty times
the work. Here neighbouring documents are cut out together as short blocks, and attention runs inside of these.

Lengths: S slots of a grid, B blocks × L slots, H heads × D numbers a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IMPLEMENTATION = "cllm4rec_blocks"
"""Under this name transformers finds `attend`."""

_WINDOW = 64
"""Documents that begin in the same window of a row share a block."""
_STEP = 16
"""Blocks are padded to a multiple of this, so that few shapes exist."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """B blocks of L slots. `read` says which slot stands where (B·L), `write` the same with S for what is padding."""

    read: Tensor
    write: Tensor
    bias_BLL: Tensor
    """0 where a slot may look (earlier slots of the same document), -inf elsewhere."""

    def cut(self, states_SHD: Tensor) -> Tensor:
        """(S, H, D) → (B·H, L, D)."""
        num_blocks, length = self.bias_BLL.shape[:2]
        taken = states_SHD.index_select(0, self.read).view(num_blocks, length, *states_SHD.shape[1:])
        return taken.transpose(1, 2).reshape(-1, length, states_SHD.shape[2])

    def paste(self, states_CLD: Tensor, target_SHD: Tensor) -> None:
        """The inverse of `cut`, into its slots of (S + 1, H, D)."""
        num_blocks, length = self.bias_BLL.shape[:2]
        blocks = states_CLD.view(num_blocks, -1, length, states_CLD.shape[2]).transpose(1, 2)
        target_SHD.index_copy_(0, self.write, blocks.reshape(-1, *target_SHD.shape[1:]))


def blocks_of(segment_RT: npt.NDArray[Any], device: torch.device) -> tuple[Blocks, ...]:
    """Every slot of a packed grid in exactly one block, with its whole document; one entry a block length."""
    begins, ends, segment = _blocks(segment_RT)
    lengths = -(-(ends - begins) // _STEP) * _STEP
    return tuple(
        _gathered(begins[lengths == length], ends[lengths == length], segment, int(length), device)
        for length in np.unique(lengths)
    )


def is_plain(segment_RT: npt.NDArray[Any]) -> bool:
    """Whether every row is one document from its first column on: then looking back is all the mask there is."""
    return bool((segment_RT <= 1).all() and (np.diff(segment_RT, axis=1) <= 0).all())


def _blocks(segment_RT: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
    """First slot and end of each block, and a number for every slot that tells documents (and padding) apart."""
    num_rows, num_columns = segment_RT.shape
    is_first = np.ones((num_rows, num_columns), bool)
    is_first[:, 1:] = segment_RT[:, 1:] != segment_RT[:, :-1]
    starts = np.flatnonzero(is_first.ravel())
    windows = starts // num_columns * num_columns + starts % num_columns // _WINDOW
    begins = starts[np.concatenate([[True], windows[1:] != windows[:-1]])]
    ends = np.concatenate([begins[1:], [segment_RT.size]])
    return begins, ends, np.cumsum(is_first.ravel())


def _gathered(
    begins: npt.NDArray[Any], ends: npt.NDArray[Any], segment: npt.NDArray[Any], length: int, device: torch.device
) -> Blocks:
    slot_BL = begins[:, None] + np.arange(length)
    is_real_BL = slot_BL < ends[:, None]
    read_BL = np.where(is_real_BL, slot_BL, begins[:, None])
    segment_BL = np.where(is_real_BL, segment[read_BL], 0)
    may_look = (segment_BL[:, :, None] == segment_BL[:, None, :]) & np.tri(length, dtype=bool)
    bias_BLL = np.where(may_look, np.float32(0.0), np.float32(-np.inf))
    write_BL = np.where(is_real_BL, slot_BL, len(segment))
    read, write, bias = (torch.from_numpy(array).to(device) for array in (read_BL.ravel(), write_BL.ravel(), bias_BLL))
    return Blocks(read, write, bias)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    blocks: Sequence[Blocks] | None = None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention: (R, H, T, D) in, (R, T, H, D) out.

    No blocks: every row is one document. `blocks` None: a call that is not from here, answered as transformers would.
    """
    if blocks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        own: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return own
    num_rows, num_heads, num_columns, size = query.shape
    if key.shape[1] != num_heads:  # several heads share a key
        key, value = (states.repeat_interleave(num_heads // states.shape[1], dim=1) for states in (key, value))
    if not blocks:
        plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return plain.transpose(1, 2), None
    flat = (states.transpose(1, 2).reshape(num_rows * num_columns, num_heads, size) for states in (query, key, value))
    scale = size**-0.5 if scaling is None else scaling
    attended: Tensor = _BlockAttention.apply(*flat, scale, tuple(blocks))  # type: ignore[no-untyped-call]
    return attended.view(num_rows, num_columns, num_heads, size), None


class _BlockAttention(torch.autograd.Function):
    """softmax(scale · Q Kᵀ + bias) V block by block, with its gradient written out: every step a product or a gather.

    Not torch's fused attention, whose backward pass in bf16 on a CPU takes as long as all matrix products of a layer.
    """

    @staticmethod
    def forward(
        ctx: Any, query_SHD: Tensor, key_SHD: Tensor, value_SHD: Tensor, scale: float, blocks: tuple[Blocks, ...]
    ) -> Tensor:
        attended = query_SHD.new_empty(len(query_SHD) + 1, *query_SHD.shape[1:])
        kept = []
        for block in blocks:
            query, key, value = (block.cut(states) for states in (query_SHD, key_SHD, value_SHD))
            weights = _weights(query, key, scale, block.bias_BLL)
            block.paste(weights @ value, attended)
            kept += [query, key, value, weights]
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*kept)
            ctx.scale, ctx.blocks = scale, blocks
        return attended[:-1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SHD,) = grad_outputs
        grads = [grad_SHD.new_empty(len(grad_SHD) + 1, *grad_SHD.shape[1:]) for _ in range(3)]
        for number, block in enumerate(ctx.blocks):
            query, key, value, weights = ctx.saved_tensors[4 * number : 4 * number + 4]
            grad = block.cut(grad_SHD)
            grad_weights = grad @ value.transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            block.paste(grad_scores @ key, grads[0])
            block.paste(grad_scores.transpose(1, 2) @ query, grads[1])
            block.paste(weights.transpose(1, 2) @ grad, grads[2])
        return (*(gradient[:-1] for gradient in grads), None, None)


def _weights(query: Tensor, key: Tensor, scale: float, bias_BLL: Tensor) -> Tensor:
    num_blocks, length = bias_BLL.shape[:2]
    scores = (query @ key.transpose(1, 2)).mul_(scale)
    scores.view(num_blocks, -1, length, length).add_(bias_BLL[:, None].to(scores.dtype))
    return scores.softmax(dim=-1)
