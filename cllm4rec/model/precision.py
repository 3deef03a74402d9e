"""The precision in which a device computes."""

from __future__ import annotations

import torch

_CPUS_WITH_BF16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""bfloat16 multiplication instructions of x86 and ARM, by their names in `torch.cpu.get_capabilities`."""


def precision_on(device: torch.device | str, bf16: bool) -> torch.dtype:
    """bfloat16 if it is requested (`training.bf16`) and the device multiplies it natively, otherwise float32.

    Other devices emulate bfloat16 with float32 instructions, which is slower: a CPU with AVX-512 but no bfloat16
    instructions runs bfloat16 products at a fifth of its float32 rate (docs/decisions.md, "Speed").
    """
    return torch.bfloat16 if bf16 and has_native_bf16(torch.device(device)) else torch.float32


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _CPUS_WITH_BF16)
