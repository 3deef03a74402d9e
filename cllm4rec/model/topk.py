"""The k best of many logits with ties settled by lower index: whatever torch's own top-k does with ties.

A logit and its item make one int64 key whose order is that of both. Keys of all items cost more than the product that makes
the logits, so they are made of what torch's top-k finds, and of everything only where a tie runs across the k-th place.

Lengths: B users, J items, K list length.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


def stable_topk(logits_BJ: Tensor, k: int, first_item: int = 0) -> Tensor:
    """The `pack_keys` of each row's k best (or of all J, where those are fewer), descending."""
    num_items = logits_BJ.shape[1]
    if num_items <= k:
        every = torch.arange(num_items, device=logits_BJ.device)
        return pack_keys(logits_BJ, first_item + every).sort(dim=1, descending=True).values
    found = logits_BJ.topk(k + 1, dim=1)
    keys_BK = pack_keys(found.values, first_item + found.indices)[:, :k].sort(dim=1, descending=True).values
    is_tied = found.values[:, k - 1] == found.values[:, k]
    if is_tied.any():
        every = torch.arange(num_items, device=logits_BJ.device)
        keys_BK[is_tied] = pack_keys(logits_BJ[is_tied], first_item + every).topk(k, dim=1).values
    return keys_BK


def pack_keys(logits: Tensor, items: Tensor) -> Tensor:
    """int64 keys whose descending order is that of (logit descending, item index ascending)."""
    bits = (logits.float() + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal 0.0
    # Floats order as sign-magnitude integers: mirror the negative ones.
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    return ordered * (1 << 32) + ((1 << 31) - items)


def unpack_keys(keys: Tensor, k: int) -> tuple[IntArray, FloatArray]:
    """Items and logits of keys, (B, k); where there are fewer than k, and for masked items (-inf), -1 and -inf."""
    low = keys & 0xFFFFFFFF
    items = ((1 << 31) - low).cpu().numpy()
    ordered = ((keys - low) >> 32).to(torch.int64)
    bits = torch.where(ordered >= 0, ordered, (-ordered) | 0x80000000)
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
    scores = signed.view(torch.float32).cpu().numpy()
    items = np.where(np.isneginf(scores), -1, items)
    missing = k - items.shape[1]
    return (
        np.pad(items, ((0, 0), (0, missing)), constant_values=-1),
        np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf).astype(np.float32),
    )
