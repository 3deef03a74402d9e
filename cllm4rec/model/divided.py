"""Parameters that DeepSpeed's ZeRO-3 divides over the workers: they are empty, except while their layer runs."""

from __future__ import annotations

from torch import Tensor


def is_divided(weight: Tensor) -> bool:
    """Whether the workers have divided a parameter. Holds as well while it is gathered."""
    return hasattr(weight, "ds_tensor")
