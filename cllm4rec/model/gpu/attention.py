"""Attention among the tokens of each document on a GPU: documents end to end, one flash attention over all of them.

Lengths: S slots of a grid, D documents, H heads × K numbers of a head.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor

from cllm4rec.typing import Array


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
    """Causal attention inside each span: (S, H, K) each → (S, H, K). Keys and values may have fewer heads."""
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        query, key, value, spans.bounds, spans.bounds, spans.longest, spans.longest, scale=scale, window_size=(-1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    assert isinstance(attended, Tensor)
    return attended


def runs_on(states: Tensor) -> bool:
    """Whether flash attention takes these: half precision on a GPU that has it."""
    return states.device.type == "cuda" and states.dtype in (torch.bfloat16, torch.float16) and _has_varlen()


@functools.cache
def _has_varlen() -> bool:
    """Whether this torch has attention over spans (2.10 or newer)."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)
