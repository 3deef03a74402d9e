"""A top-k in which ties go to the lower item index. torch's own top-k leaves the order of ties undefined.

A logit and its item index form one int64 key that sorts by both. Keys of all items would cost more than the product that
computes the logits. Keys are therefore built only for the result of torch's top-k, and for whole rows only if a tie crosses
the k-th place.

Shapes: B users, J items, K list length.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cllm4rec.typing import Float32Array, IntArray


def stable_topk(logits_BJ: Tensor, k: int, first_item: int = 0) -> Tensor:
    """The `pack_keys` of the k best items of each row, descending, (B, min(k, J)). first_item: the index of column 0."""
    num_items = logits_BJ.shape[1]
    item_J = first_item + torch.arange(num_items, device=logits_BJ.device)
    if num_items <= k:
        return pack_keys(logits_BJ, item_J).sort(dim=1, descending=True).values
    found = logits_BJ.topk(k + 1, dim=1)
    keys_BK = pack_keys(found.values, first_item + found.indices)[:, :k].sort(dim=1, descending=True).values
    is_tied = found.values[:, k - 1] == found.values[:, k]
    if is_tied.any():
        keys_BK[is_tied] = pack_keys(logits_BJ[is_tied], item_J).topk(k, dim=1).values
    return keys_BK


def pack_keys(logits: Tensor, items: Tensor) -> Tensor:
    """int64 keys whose descending order is (logit descending, item index ascending)."""
    bits = (logits.float() + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal 0.0
    # The bits of floats sort as sign-magnitude integers: mirror the negative ones.
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    return ordered * (1 << 32) + ((1 << 31) - items)


def unpack_keys(keys: Tensor, k: int) -> tuple[IntArray, Float32Array]:
    """Items and logits of keys, (B, k) each. Masked items (logit -inf) and missing ones become -1 and -inf."""
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
