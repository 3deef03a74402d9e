"""Attention within each document of a packed grid. Selects the kernel for the device.

A mask over whole rows would multiply the work by several hundred: documents have about a dozen tokens, rows have
thousands. On a GPU, one flash attention call runs over documents placed end to end (`gpu.attention`). On a CPU, and in
float32, documents are gathered into short blocks (`cpu.attention`). Sliding windows, soft caps and attention sinks are
supported on both; on a GPU, soft caps and sinks take the blocks too.

Shapes: R rows × T columns = S slots of a grid, H heads × K features per head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from cllm4rec.model.cpu.attention import Blocks, Variant, attend_blocks, attend_blocks_variant, build_blocks
from cllm4rec.model.gpu import attention as gpu
from cllm4rec.typing import Array

IMPLEMENTATION = "cllm4rec"
"""The name under which `attend` is registered with transformers."""


@dataclasses.dataclass(frozen=True)
class DocumentLayout:
    """Which slots of a grid attend to which: each slot attends to itself and the earlier slots of its document.

    The form that a kernel needs (`blocks` or `spans`) is built on first use.

    batch_invariant: the attention output of a document is bit-identical regardless of the rest of the grid.
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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: (R, H, T, K) in, (R, T, H, K) out.

    sliding_window: a slot attends to this number of slots at most, itself included (Mistral, Gemma).
    softcap: scores are limited to ± this by tanh (Gemma 2).
    s_aux: (H,), the score of a slot that is attended to and has no value (gpt-oss).

    Without `layout` the call does not come from this package and is passed to transformers' own implementation.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output
    num_rows, num_heads, num_columns, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    # Under autocast, rotary queries and keys are float32 and values are not.
    query, key = query.to(value.dtype), key.to(value.dtype)
    heads_per_key = num_heads // key.shape[1]
    if heads_per_key > 1:  # grouped-query attention
        key, value = (states.repeat_interleave(heads_per_key, dim=1) for states in (key, value))
    longest = layout.segment_RT.shape[1]
    window = None if sliding_window is None or sliding_window >= longest else sliding_window
    variant = Variant(window, softcap, s_aux)
    # A plan of the memory runs on the meta device, which has no autocast.
    with contextlib.nullcontext() if value.is_meta else torch.autocast(value.device.type, enabled=False):
        if gpu.runs_on(value) and softcap is None and s_aux is None and (window is None or gpu.takes_a_window()):
            query, key, value = (_flatten_slots(states) for states in (query, key, value))
            attended = gpu.attend_spans(query, key, value, layout.spans, scale, window)
        else:
            states = _flatten_slots(torch.cat([query, key, value], dim=1))
            if variant == Variant():
                attended = attend_blocks(states, scale, layout.blocks)
            else:
                attended = attend_blocks_variant(states, scale, layout.blocks, variant)
    return attended.view(num_rows, num_columns, num_heads, size), None


def _flatten_slots(states: Tensor) -> Tensor:
    """(R, H, T, K) → (S, H, K)."""
    return states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])
