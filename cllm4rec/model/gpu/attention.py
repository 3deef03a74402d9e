"""Attention among the tokens of each document on a GPU: documents end to end, one flash attention over all of them.

Lengths: S slots of a grid, D documents, H heads × K numbers of a head.
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

_MOST_HEAD_SIZE = 256


@dataclasses.dataclass(frozen=True)
class Spans:
    """Where each document of a grid begins and ends among all slots; padding at the end is one span of its own."""

    bounds: Tensor
    """int32, (D + 1) or (D + 2): the first slot of each span, then S."""
    longest: int


def build_spans(segment_RT: Array, device: torch.device) -> Spans:
    """The spans of a grid whose documents are numbered from 1 in each row; 0 is padding, which stands behind them."""
    segment_S = segment_RT.ravel()
    is_first = np.ones(segment_S.size, bool)
    is_first[1:] = segment_S[1:] != segment_S[:-1]
    is_first[:: segment_RT.shape[1]] = True
    bounds = np.append(np.flatnonzero(is_first), segment_S.size).astype(np.int32)
    return Spans(torch.from_numpy(bounds).to(device, non_blocking=True), int(np.diff(bounds).max(initial=1)))


def attend_spans(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> Tensor:
    """Causal attention inside each span: (S, H, K) each → (S, H, K)."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = spans.bounds, spans.longest
    causal: dict[str, Any] = {"window_size": (-1, 0)} if _takes_a_window() else {"is_causal": True}
    attended = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, **causal)
    assert isinstance(attended, Tensor)
    return attended


def runs_on(states: Tensor) -> bool:
    """Whether flash attention takes heads like these, (..., K): half precision, of a size it knows, on a GPU that has it."""
    is_half, size = states.dtype in (torch.bfloat16, torch.float16), states.shape[-1]
    return states.device.type == "cuda" and is_half and size % 8 == 0 and size <= _MOST_HEAD_SIZE and _has_varlen()


@functools.cache
def _has_varlen() -> bool:
    """Whether this torch has attention over spans (2.10 or newer)."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


@functools.cache
def _takes_a_window() -> bool:
    """How this torch says causal: newer ones by a window of (-1, 0), older ones by a flag."""
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters
