"""LoRA adapters: small trained matrices beside the frozen weights of a backbone (Hu et al. 2021, arXiv 2106.09685).

    add_adapter(backbone, config.backbone.adapter, seed)     W becomes W + (alpha / rank) · B A, with B = 0 at the start
    weights = adapter_weights(backbone)                      the trained matrices A and B by name
    merge_adapter(backbone)                                  for scoring: W + (alpha / rank) · B A as one matrix

peft does the work; A and B are float32 in any precision of the frozen weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cllm4rec.config import Adapter
from cllm4rec.errors import ConfigError
from cllm4rec.model.backbone import Backbone

_MATRICES = (".lora_A.", ".lora_B.")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(matrix in name for matrix in _MATRICES)


def add_adapter(backbone: Backbone, adapter: Adapter, seed: int) -> None:
    """Add an adapter that changes nothing yet, in place, and freeze the weights beside it.

    Raises ConfigError if the model has no layers of the names `adapter.targets`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    head = backbone.model.get_output_embeddings()
    linear = {
        name: layer
        for name, layer in backbone.model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    }
    names = sorted({name.rpartition(".")[2] for name in linear})
    unknown = sorted(set(adapter.targets or ()) - set(names))
    if unknown:
        raise ConfigError(
            f"backbone.adapter.targets names {unknown[0]}, which is no adaptable layer of the language model; its layers are "
            f"{', '.join(names)}"
        )
    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # any number works
        target_modules="all-linear" if adapter.targets is None else list(adapter.targets),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),  # GPT-2 stores transposed weights
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, backbone.model)
    for name, weight in backbone.named_parameters():
        weight.requires_grad_(is_adapter(name))
        if is_adapter(name):
            weight.data = weight.data.float()  # peft follows the precision of the frozen weights


def adapter_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The matrices of an adapter by parameter name, on the CPU."""
    return {name: weight.detach().cpu() for name, weight in backbone.named_parameters() if is_adapter(name)}


@torch.no_grad()
def load_adapter_weights(backbone: Backbone, weights: dict[str, Tensor]) -> None:
    """Copy the matrices of an adapter. Raises KeyError or RuntimeError if names or shapes differ."""
    parameters = {name: weight for name, weight in backbone.named_parameters() if is_adapter(name)}
    if parameters.keys() != weights.keys():
        raise KeyError(min(parameters.keys() ^ weights.keys()))
    for name, weight in parameters.items():
        weight.copy_(weights[name])


@torch.no_grad()
def merge_adapter(backbone: Backbone) -> None:
    """Add the product of an adapter's matrices to the weights beside it and remove the adapter, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in list(backbone.model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                setattr(module, name, layer.get_base_layer())
    backbone.requires_grad_(False)
