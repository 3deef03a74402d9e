"""Attention within each document on a GPU: one flash attention call over documents placed end to end.

Shapes: S slots of a grid, D documents, H heads × K features per head.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm4rec.typing import Array

_MAX_HEAD_SIZE = 256


@dataclasses.dataclass(frozen=True)
class Spans:
    """The first and last slot of each document of a grid. The padding at the end of a row is a span of its own."""

    bounds: Tensor
    """int32, (number of spans + 1): the first slot of each span, then S."""
    longest: int


def build_spans(segment_RT: Array, device: torch.device) -> Spans:
    """The spans of a grid. segment_RT: numbers the documents of each row from 1; 0 is the padding after them."""
    segment_S = segment_RT.ravel()
    is_first = np.ones(segment_S.size, bool)
    is_first[1:] = segment_S[1:] != segment_S[:-1]
    is_first[:: segment_RT.shape[1]] = True
    bounds = np.append(np.flatnonzero(is_first), segment_S.size).astype(np.int32)
    return Spans(torch.from_numpy(bounds).to(device, non_blocking=True), int(np.diff(bounds).max(initial=1)))


def attend_spans(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention within each span: query, key, value (S, H, K) → (S, H, K).

    window: the number of slots that a slot attends to, itself included (only if `takes_a_window`). None: all earlier ones.
    """
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = spans.bounds, spans.longest
    left = -1 if window is None else window - 1
    causal: dict[str, Any] = {"window_size": (left, 0)} if takes_a_window() else {"is_causal": True}
    attended = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, **causal)
    assert isinstance(attended, Tensor)
    return attended


def runs_on(states: Tensor) -> bool:
    """Whether flash attention supports states (..., K): half precision, a supported head size, a GPU and torch with it."""
    is_half, size = states.dtype in (torch.bfloat16, torch.float16), states.shape[-1]
    return states.device.type == "cuda" and is_half and size % 8 == 0 and size <= _MAX_HEAD_SIZE and _has_varlen()


@functools.cache
def _has_varlen() -> bool:
    """Whether torch provides variable-length attention (2.10 or newer) and the GPU supports it (compute capability 8.0)."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


@functools.cache
def takes_a_window() -> bool:
    """Whether torch selects causal attention by a window of (-1, 0), as newer versions do, instead of by a flag."""
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters
