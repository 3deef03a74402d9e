"""Which precision a device computes in."""

from __future__ import annotations

import torch

_CPUS_WITH_BF16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""Instructions that multiply bf16, of x86 and of ARM, as `torch.cpu.get_capabilities` names them."""


def precision_on(device: torch.device | str, bf16: bool) -> torch.dtype:
    """bfloat16 where it is wanted (`training.bf16`) and the device multiplies it, else float32.

    Others compute it all the same, by instructions of float32 and slower: a CPU with AVX-512 alone runs bf16 products at a
    fifth of its fp32 rate (DECISIONS.md, "Speed").
    """
    return torch.bfloat16 if bf16 and multiplies_bf16(torch.device(device)) else torch.float32


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _CPUS_WITH_BF16)
