"""Attention within each document, in blocks: plain matrix products, which run on every device.

Documents are gathered from their row into blocks of about 32 slots; short neighboring documents share a block. Attention
runs within each block.

Shapes: S slots of a grid, B blocks × L slots of a group, H heads × D features per head, P concatenated parts (query, key and
value are three).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm4rec.typing import Array

_WINDOW = 32
"""Documents that begin in the same window of a row share a block."""
_STEP = 16
"""Block lengths are multiples of this, so that there are few distinct shapes."""
_INVARIANT_STEP = 8
"""The same if each document has its own block."""
_COUNT_STEP = 4
"""Groups of shared blocks are padded to a multiple of this number of blocks, for the same reason."""


@dataclasses.dataclass(frozen=True)
class Group:
    """B blocks of L slots."""

    read: Tensor
    """(B·L): the slots of all blocks, block by block."""
    bias_BLL: Tensor
    """0 for pairs of slots that attend (a slot to itself and to earlier slots of its document), otherwise -inf."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Assigns every slot of a packed grid to one block that holds its whole document. Blocks of one length form a group.

    Blocks have positions in order of groups. For each slot: the number of positions before its group, the number of
    positions in its group, the first position of its block within the group, its position within the block, and the length
    of its block.
    """

    groups: tuple[Group, ...]
    num_positions: int
    """B·L, summed over groups."""
    group_begin_S: Tensor
    group_size_S: Tensor
    block_begin_S: Tensor
    position_S: Tensor
    length_S: Tensor

    _rows: dict[tuple[int, ...], Tensor] = dataclasses.field(default_factory=dict, compare=False)
    """Cached row indices of `gather` and `scatter` by their arguments. All layers of a model use the same ones."""

    def gather(self, states: Tensor, number: int, num_parts: int) -> Tensor:
        """The states of group `number`: (S, P·H, D) → (P, B·H, L, D)."""
        num_slots, num_rows, size = states.shape
        num_heads, (num_blocks, length) = num_rows // num_parts, self.groups[number].bias_BLL.shape[:2]
        key = (number, num_parts, num_heads)
        if key not in self._rows:
            part_and_head = torch.arange(num_rows, device=states.device).view(num_parts, 1, num_heads, 1)
            rows = self.groups[number].read.view(num_blocks, 1, length) * num_rows + part_and_head
            self._rows[key] = rows.flatten()
        gathered = states.reshape(num_slots * num_rows, size).index_select(0, self._rows[key])
        return gathered.view(num_parts, num_blocks * num_heads, length, size)

    def scatter(self, gathered: Tensor, num_parts: int, num_heads: int) -> Tensor:
        """The inverse of `gather` for all groups, concatenated as rows of D features: → (S, P·H, D)."""
        key = (num_parts, num_heads)
        if key not in self._rows:
            first_S = self.group_begin_S * (num_parts * num_heads) + self.block_begin_S * num_heads + self.position_S
            part = torch.arange(num_parts, device=gathered.device).view(1, num_parts, 1)
            head = torch.arange(num_heads, device=gathered.device)
            rows = first_S[:, None, None] + part * (self.group_size_S * num_heads)[:, None, None]
            self._rows[key] = (rows + head * self.length_S[:, None, None]).flatten()
        states = gathered.index_select(0, self._rows[key])
        return states.view(len(self.position_S), num_parts * num_heads, -1)


def build_blocks(segment_RT: Array, device: torch.device, batch_invariant: bool = False) -> Blocks:
    """The blocks of a grid. segment_RT: numbers the documents of each row from 1; 0 is padding.

    batch_invariant: give each document its own block, and each group a number of blocks that depends only on the block
    length and the size of the grid. Attention then gives a document the same bits regardless of the rest of the grid.
    """
    segment_S, is_first = _runs(segment_RT)
    starts = np.flatnonzero(is_first)
    if batch_invariant:
        ends = np.append(starts[1:], segment_S.size)
        is_document = segment_RT.ravel()[starts] > 0
        begins, ends, step = starts[is_document], ends[is_document], _INVARIANT_STEP
    else:
        num_columns = segment_RT.shape[1]
        windows = starts // num_columns * num_columns + starts % num_columns // _WINDOW
        begins = starts[np.concatenate([[True], windows[1:] != windows[:-1]])]
        ends, step = np.append(begins[1:], segment_S.size), _STEP
    lengths = -(-(ends - begins) // step) * step
    builder = _BlocksBuilder(segment_S, device)
    for length in np.unique(lengths).tolist():
        members = np.flatnonzero(lengths == length)
        size = -(-len(members) // _COUNT_STEP) * _COUNT_STEP
        if batch_invariant:  # the most documents of this length that fit: all but the shortest need one group only
            size = max(1, segment_S.size // max(length - step + 1, step // 2))
        for first in range(0, len(members), size):
            chunk = members[first : first + size]
            builder.add(begins[chunk], ends[chunk], length, size)
    return builder.blocks()


def _runs(segment_RT: Array) -> tuple[Array, Array]:
    """A document number for each slot, and whether the slot begins a document. Each padding slot is its own document."""
    is_first = segment_RT == 0
    is_first[:, 0] = True
    is_first[:, 1:] |= segment_RT[:, 1:] != segment_RT[:, :-1]
    return np.cumsum(is_first.ravel()), is_first.ravel()


class _BlocksBuilder:
    """Collects groups and the position of each slot."""

    def __init__(self, segment_S: Array, device: torch.device) -> None:
        self._segment_S, self._device = segment_S, device
        self._groups: list[Group] = []
        self._num_positions = 0
        self._fields = np.zeros((5, len(segment_S)), np.int64)
        """The five per-slot fields of `Blocks`, in order."""

    def add(self, begins: Array, ends: Array, length: int, num_blocks: int) -> None:
        """Add a group with one block for each range of slots, padded with unused blocks to `num_blocks`."""
        padding = (0, num_blocks - len(begins))
        begins, ends = np.pad(begins, padding, mode="edge"), np.pad(ends, padding)
        slot_BL = begins[:, None] + np.arange(length)
        is_real_BL = slot_BL < ends[:, None]
        read_BL = np.where(is_real_BL, slot_BL, begins[:, None])
        segment_BL = np.where(is_real_BL, self._segment_S[read_BL], 0)
        attends_BLL = (segment_BL[:, :, None] == segment_BL[:, None, :]) & np.tri(length, dtype=bool)
        bias_BLL = np.where(attends_BLL, np.float32(0.0), np.float32(-np.inf))
        self._groups.append(Group(self._tensor(read_BL.ravel()), self._tensor(bias_BLL)))
        size = num_blocks * length
        block, position = np.nonzero(is_real_BL)
        values: tuple[Any, ...] = (self._num_positions, size, block * length, position, length)
        for field_S, value in zip(self._fields, values, strict=True):
            field_S[slot_BL[is_real_BL]] = value
        self._num_positions += size

    def blocks(self) -> Blocks:
        group_begin, group_size, block_begin, position, length = (self._tensor(field_S) for field_S in self._fields)
        return Blocks(tuple(self._groups), self._num_positions, group_begin, group_size, block_begin, position, length)

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def attend_blocks(states: Tensor, scale: float, blocks: Blocks) -> Tensor:
    """`attention` as a differentiable function: concatenated query, key and value, (S, 3·H, D) → (S, H, D)."""
    attended: Tensor = _BlockAttention.apply(states, scale, blocks)  # type: ignore[no-untyped-call]
    return attended


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a model's attention differs from softmax(scale · Q Kᵀ) V over all earlier slots of a document.

    window: a slot attends to at most this number of slots, itself included.
    softcap: scores become softcap · tanh(score / softcap).
    sink_H: for each head, the score of a slot without a value that takes part in the softmax.
    """

    window: int | None = None
    softcap: float | None = None
    sink_H: Tensor | None = None


def attend_blocks_variant(states: Tensor, scale: float, blocks: Blocks, variant: Variant) -> Tensor:
    """`attend_blocks` for a variant, in operations that torch differentiates: (S, 3·H, D) → (S, H, D)."""
    num_heads = states.shape[1] // 3
    attended = []
    for number, group in enumerate(blocks.groups):
        query, key, value = blocks.gather(states, number, 3)
        num_blocks, length = group.bias_BLL.shape[:2]
        scores = (query @ key.transpose(1, 2) * scale).float().view(num_blocks, num_heads, length, length)
        if variant.softcap is not None:
            scores = variant.softcap * torch.tanh(scores / variant.softcap)
        scores = scores + group.bias_BLL[:, None]
        if variant.window is not None and variant.window < length:
            too_far = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril(-variant.window)
            scores = scores.masked_fill(too_far, -torch.inf)
        if variant.sink_H is not None:
            sink = variant.sink_H.float().view(1, num_heads, 1, 1).expand(num_blocks, -1, length, -1)
            scores = torch.cat([scores, sink], dim=3)
        weights = scores.softmax(dim=3)[..., :length].to(value.dtype)
        attended.append((weights.flatten(0, 1) @ value).flatten(0, 1))
    return blocks.scatter(torch.cat(attended), 1, num_heads)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, scale: float, blocks: Blocks) -> Tensor:
        attended, saved = attention(states, scale, blocks)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*saved)
            ctx.scale, ctx.blocks = scale, blocks
        return attended

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return attention_backward(grad_outputs[0], ctx.saved_tensors, ctx.scale, ctx.blocks), None, None


def attention(states: Tensor, scale: float, blocks: Blocks) -> tuple[Tensor, list[Tensor]]:
    """softmax(scale · Q Kᵀ + bias) V block by block: query, key and value, (S, 3·H, D) → (S, H, D).

    Also returns the tensors that `attention_backward` needs, two per group. torch's fused attention is not used: in bf16 on
    a CPU its backward pass takes as long as all matrix products of a layer.
    """
    num_heads, size = states.shape[1] // 3, states.shape[2]
    attended = states.new_empty(num_heads * blocks.num_positions, size)
    saved = []
    begin = 0
    for number, group in enumerate(blocks.groups):
        parts = blocks.gather(states, number, 3)
        query, key, value = parts
        weights = _weights(query, key, scale, group.bias_BLL)
        end = begin + len(value) * value.shape[1]
        torch.bmm(weights, value, out=attended[begin:end].view(value.shape))
        saved += [parts, weights]
        begin = end
    return blocks.scatter(attended, 1, num_heads), saved


def attention_backward(grad_SHD: Tensor, saved: tuple[Tensor, ...], scale: float, blocks: Blocks) -> Tensor:
    """The gradient of the input of `attention`, (S, 3·H, D), from that of its output and its saved tensors."""
    num_heads, size = grad_SHD.shape[1:]
    grads = grad_SHD.new_empty(3 * num_heads * blocks.num_positions, size)
    begin = 0
    for number in range(len(blocks.groups)):
        (query, key, value), weights = saved[2 * number], saved[2 * number + 1]
        (grad,) = blocks.gather(grad_SHD, number, 1)
        grad_scores = torch._softmax_backward_data(grad @ value.transpose(1, 2), weights, -1, weights.dtype)
        end = begin + 3 * grad.shape[0] * grad.shape[1]
        grad_query, grad_key, grad_value = grads[begin:end].view(3, *grad.shape)
        torch.baddbmm(grad_query, grad_scores, key, beta=0, alpha=scale, out=grad_query)
        torch.baddbmm(grad_key, grad_scores.transpose(1, 2), query, beta=0, alpha=scale, out=grad_key)
        torch.bmm(weights.transpose(1, 2), grad, out=grad_value)
        begin = end
    return blocks.scatter(grads, 3, num_heads)


def _weights(query: Tensor, key: Tensor, scale: float, bias_BLL: Tensor) -> Tensor:
    num_blocks, length = bias_BLL.shape[:2]
    uninitialized = query.new_empty(len(query), length, length)  # beta=0: not read
    scores = torch.baddbmm(uninitialized, query, key.transpose(1, 2), beta=0, alpha=scale)
    scores.view(num_blocks, -1, length, length).add_(bias_BLL[:, None].to(scores.dtype))
    # torch's softmax in bf16 takes two to four times as long if the row length is not a multiple of 32.
    return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)
