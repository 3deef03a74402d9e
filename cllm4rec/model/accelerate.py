"""Replaces the layers of a backbone with faster ones for its precision and device.

    accelerate(backbone, torch.bfloat16)

`model.attention` chooses the attention kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import GELUTanh

from cllm4rec.model.adapter import is_adapter
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.cpu.fused import FrozenGPT2Layer, FrozenLinear


def accelerate(backbone: Backbone, precision: torch.dtype) -> None:
    """Make a backbone compute in `precision` with the fastest available layers, in place.

    A frozen backbone (no weight but those of an adapter requires a gradient) is converted to `precision`, and its layers are
    replaced by faster ones that rely on constant weights. A trainable backbone stays float32 and computes in `precision`
    through autocast.
    """
    base = [weight for name, weight in backbone.named_parameters() if not is_adapter(name)]
    is_frozen = not any(weight.requires_grad for weight in base)
    if is_frozen:
        for weight in base:  # not buffers: rotary frequencies in bfloat16 would shift positions
            weight.data = weight.data.to(precision)
    _replace_gelu(backbone, precision)
    if is_frozen:
        head = backbone.model.get_output_embeddings()
        _replace_layers(backbone, lambda layer: None if layer is head else FrozenLinear.from_layer(layer))
        _replace_layers(backbone, FrozenGPT2Layer.from_layer)


def _replace_gelu(backbone: Backbone, precision: torch.dtype) -> None:
    """Use torch's GELU instead of transformers': the exact form (erf) in bfloat16, the tanh approximation in float32.

    In bfloat16 both forms differ from the true value of the approximation by 0.0011 (root mean square, normal inputs).
    On a CPU the exact form takes a fifth of the time.
    """
    approximate = "none" if precision == torch.bfloat16 else "tanh"
    _replace_layers(backbone, lambda layer: nn.GELU(approximate) if isinstance(layer, GELUTanh) else None)


def _replace_layers(backbone: Backbone, convert: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace every layer for which `convert(layer)` is not None by that result."""
    for module in list(backbone.model.modules()):
        if isinstance(module, nn.ModuleDict):  # the matrices of an adapter, which are loaded again during training
            continue
        for name, layer in list(module.named_children()):
            replacement = convert(layer)
            if replacement is not None:
                setattr(module, name, replacement)
