"""Attention among the tokens of each document of a packed grid: the one place where a backbone finds it, on any device.

A mask over a whole row would make every token meet the whole row: with documents of a dozen tokens in rows of some
thousand, hundreds of times the work. On a GPU documents lie end to end in one flash attention (`gpu.attention`); elsewhere,
and in float32, they are cut out as short blocks (`cpu.attention`).

Lengths: R rows × T columns = S slots of a grid, H heads × K numbers of a head.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from cllm4rec.model.cpu.attention import Blocks, attend_blocks, build_blocks
from cllm4rec.model.gpu import attention as gpu
from cllm4rec.typing import Array

IMPLEMENTATION = "cllm4rec"
"""Under this name transformers finds `attend`."""


@dataclasses.dataclass(frozen=True)
class DocumentLayout:
    """Which slots of a grid may look at which: earlier ones of the same document. Made for a kernel when it first asks.

    batch_invariant: what attention gives a document is bit for bit the same whatever else is in the grid.
    """

    segment_RT: Array
    device: torch.device
    batch_invariant: bool = False

    @functools.cached_property
    def blocks(self) -> Blocks:
        return build_blocks(self.segment_RT, self.device, self.batch_invariant)

    @functools.cached_property
    def spans(self) -> gpu.Spans:
        return gpu.build_spans(self.segment_RT, self.device)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: DocumentLayout | None = None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention: (R, H, T, K) in, (R, T, H, K) out.

    `layout` None: a call that is not from here, answered as transformers would.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        own: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return own
    num_rows, num_heads, num_columns, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    # Rotated queries and keys are float32 under autocast, values are not.
    query, key = query.to(value.dtype), key.to(value.dtype)
    shared = num_heads // key.shape[1]
    if shared > 1:  # several heads share a key
        key, value = (part.repeat_interleave(shared, dim=1) for part in (key, value))
    with torch.autocast(value.device.type, enabled=False):
        if gpu.runs_on(value):
            attended = gpu.attend_spans(_by_slot(query), _by_slot(key), _by_slot(value), layout.spans, scale)
        else:
            attended = attend_blocks(_by_slot(torch.cat([query, key, value], dim=1)), scale, layout.blocks)
    return attended.view(num_rows, num_columns, num_heads, size), None


def _by_slot(states: Tensor) -> Tensor:
    """(R, H, T, K) → (S, H, K)."""
    return states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])
