"""Attention among the tokens of each document, in blocks: plain matrix products, which every device has.

Documents are cut out of their row, short neighbors together, as blocks of some 32 slots, and attention runs inside of each
block.

Lengths: S slots of a grid, B blocks × L slots of a group, H heads × D numbers a head, P parts side by side (query, key and
value are three).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_WINDOW = 32
"""Documents that begin in the same window of a row share a block."""
_STEP = 16
"""Blocks are padded to a multiple of this, so that few shapes exist."""
_INVARIANT_STEP = 8
"""The same where each document has a block of its own."""
_COUNT_STEP = 4
"""Groups of blocks that documents share are padded to a multiple of this number of blocks, for the same reason."""

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Group:
    """B blocks of L slots."""

    read: Tensor
    """(B·L) slots, block by block."""
    bias_BLL: Tensor
    """0 where a slot may look (earlier slots of the same document), -inf elsewhere."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Every slot of a packed grid in one block, with its whole document; a group for each block length.

    Where each slot stands: places in the groups before its own, places of its group, the first place of its block in the
    group, its place in the block, and the block's length.
    """

    groups: tuple[Group, ...]
    num_places: int
    """B·L, summed over groups."""
    group_begin_S: Tensor
    group_size_S: Tensor
    block_begin_S: Tensor
    place_S: Tensor
    length_S: Tensor

    _rows: dict[tuple[int, ...], Tensor] = dataclasses.field(default_factory=dict, compare=False)
    """Rows to read, by what asked for them: all layers of a model ask alike."""

    def cut(self, states: Tensor, number: int, num_parts: int) -> Tensor:
        """What stands in a group: (S, P·H, D) → (P, B·H, L, D)."""
        num_slots, num_rows, size = states.shape
        num_heads, (num_blocks, length) = num_rows // num_parts, self.groups[number].bias_BLL.shape[:2]
        key = (number, num_parts, num_heads)
        if key not in self._rows:
            part_and_head = torch.arange(num_rows, device=states.device).view(num_parts, 1, num_heads, 1)
            rows = self.groups[number].read.view(num_blocks, 1, length) * num_rows + part_and_head
            self._rows[key] = rows.flatten()
        cut = states.reshape(num_slots * num_rows, size).index_select(0, self._rows[key])
        return cut.view(num_parts, num_blocks * num_heads, length, size)

    def paste(self, cuts: Tensor, num_parts: int, num_heads: int) -> Tensor:
        """The inverse: what was cut, group after group as rows of D, → (S, P·H, D)."""
        key = (num_parts, num_heads)
        if key not in self._rows:
            first_S = self.group_begin_S * (num_parts * num_heads) + self.block_begin_S * num_heads + self.place_S
            part = torch.arange(num_parts, device=cuts.device).view(1, num_parts, 1)
            head = torch.arange(num_heads, device=cuts.device)
            rows = first_S[:, None, None] + part * (self.group_size_S * num_heads)[:, None, None]
            self._rows[key] = (rows + head * self.length_S[:, None, None]).flatten()
        pasted = cuts.index_select(0, self._rows[key])
        return pasted.view(len(self.place_S), num_parts * num_heads, -1)


def build_blocks(segment_RT: Array, device: torch.device, batch_invariant: bool = False) -> Blocks:
    """The blocks of a grid whose documents are numbered in each row (0 is padding).

    batch_invariant: one document per block, and a number of blocks per group that depends on their length and the grid's
    size alone, so that attention gives a document the same bits whatever else is in the grid.
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
    layout = _Layout(segment_S, device)
    for length in np.unique(lengths).tolist():
        members = np.flatnonzero(lengths == length)
        size = -(-len(members) // _COUNT_STEP) * _COUNT_STEP
        if batch_invariant:  # the most of this length that a grid can hold: one group is enough but for the shortest
            size = max(1, segment_S.size // max(length - step + 1, step // 2))
        for first in range(0, len(members), size):
            some = members[first : first + size]
            layout.add(begins[some], ends[some], length, size)
    return layout.blocks()


def _runs(segment_RT: Array) -> tuple[Array, Array]:
    """A number for every slot that tells documents apart, and which slots begin one. A slot of padding is one by itself."""
    is_first = segment_RT == 0
    is_first[:, 0] = True
    is_first[:, 1:] |= segment_RT[:, 1:] != segment_RT[:, :-1]
    return np.cumsum(is_first.ravel()), is_first.ravel()


class _Layout:
    """Blocks in the making."""

    def __init__(self, segment_S: Array, device: torch.device) -> None:
        self._segment_S, self._device = segment_S, device
        self._groups: list[Group] = []
        self._num_places = 0
        self._where = np.zeros((5, len(segment_S)), np.int64)

    def add(self, begins: Array, ends: Array, length: int, num_blocks: int) -> None:
        """A group of the slots from each begin to its end, filled up to `num_blocks` with blocks that nobody reads."""
        unread = (0, num_blocks - len(begins))
        begins, ends = np.pad(begins, unread, mode="edge"), np.pad(ends, unread)
        slot_BL = begins[:, None] + np.arange(length)
        is_real_BL = slot_BL < ends[:, None]
        read_BL = np.where(is_real_BL, slot_BL, begins[:, None])
        segment_BL = np.where(is_real_BL, self._segment_S[read_BL], 0)
        may_look = (segment_BL[:, :, None] == segment_BL[:, None, :]) & np.tri(length, dtype=bool)
        bias_BLL = np.where(may_look, np.float32(0.0), np.float32(-np.inf))
        self._groups.append(Group(self._tensor(read_BL.ravel()), self._tensor(bias_BLL)))
        size = num_blocks * length
        block, place = np.nonzero(is_real_BL)
        facts: tuple[Any, ...] = (self._num_places, size, block * length, place, length)
        for row, fact in zip(self._where, facts, strict=True):
            row[slot_BL[is_real_BL]] = fact
        self._num_places += size

    def blocks(self) -> Blocks:
        group_begin, group_size, block_begin, place, length = (self._tensor(row) for row in self._where)
        return Blocks(tuple(self._groups), self._num_places, group_begin, group_size, block_begin, place, length)

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def attend_blocks(states: Tensor, scale: float, blocks: Blocks) -> Tensor:
    """`attention` with its gradient: query, key and value side by side, (S, 3·H, D) → (S, H, D)."""
    attended: Tensor = _BlockAttention.apply(states, scale, blocks)  # type: ignore[no-untyped-call]
    return attended


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, scale: float, blocks: Blocks) -> Tensor:
        attended, kept = attention(states, scale, blocks)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*kept)
            ctx.scale, ctx.blocks = scale, blocks
        return attended

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return attention_backward(grad_outputs[0], ctx.saved_tensors, ctx.scale, ctx.blocks), None, None


def attention(states: Tensor, scale: float, blocks: Blocks) -> tuple[Tensor, list[Tensor]]:
    """softmax(scale · Q Kᵀ + bias) V block by block: query, key and value (S, 3·H, D) → (S, H, D), and what the way back
    needs: two tensors a group.

    Products of plain tensors, not torch's fused attention, whose backward pass in bf16 on a CPU takes as long as all
    matrix products of a layer.
    """
    num_heads, size = states.shape[1] // 3, states.shape[2]
    attended = states.new_empty(num_heads * blocks.num_places, size)
    kept = []
    begin = 0
    for number, group in enumerate(blocks.groups):
        parts = blocks.cut(states, number, 3)
        query, key, value = parts
        weights = _weights(query, key, scale, group.bias_BLL)
        end = begin + len(value) * value.shape[1]
        torch.bmm(weights, value, out=attended[begin:end].view(value.shape))
        kept += [parts, weights]
        begin = end
    return blocks.paste(attended, 1, num_heads), kept


def attention_backward(grad_SHD: Tensor, kept: tuple[Tensor, ...], scale: float, blocks: Blocks) -> Tensor:
    """The gradient of the states of `attention`, (S, 3·H, D)."""
    num_heads, size = grad_SHD.shape[1:]
    grads = grad_SHD.new_empty(3 * num_heads * blocks.num_places, size)
    begin = 0
    for number in range(len(blocks.groups)):
        (query, key, value), weights = kept[2 * number], kept[2 * number + 1]
        (grad,) = blocks.cut(grad_SHD, number, 1)
        grad_scores = torch._softmax_backward_data(grad @ value.transpose(1, 2), weights, -1, weights.dtype)
        end = begin + 3 * grad.shape[0] * grad.shape[1]
        grad_query, grad_key, grad_value = grads[begin:end].view(3, *grad.shape)
        torch.baddbmm(grad_query, grad_scores, key, beta=0, alpha=scale, out=grad_query)
        torch.baddbmm(grad_key, grad_scores.transpose(1, 2), query, beta=0, alpha=scale, out=grad_key)
        torch.bmm(weights.transpose(1, 2), grad, out=grad_value)
        begin = end
    return blocks.paste(grads, 3, num_heads)


def _weights(query: Tensor, key: Tensor, scale: float, bias_BLL: Tensor) -> Tensor:
    num_blocks, length = bias_BLL.shape[:2]
    unread = query.new_empty(len(query), length, length)
    scores = torch.baddbmm(unread, query, key.transpose(1, 2), beta=0, alpha=scale)
    scores.view(num_blocks, -1, length, length).add_(bias_BLL[:, None].to(scores.dtype))
    # In bf16 torch's softmax takes two to four times as long where rows are no multiple of 32.
    return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)
