"""Parameters that are divided over the workers (DeepSpeed's ZeRO-3), from loading to validation.

    divide(model, {"backbone.model.lm_head.weight": torch.bfloat16, ...})       each worker keeps its share of every parameter

A parameter is flattened, and worker r of W has elements [r · n, (r + 1) · n) with n = ⌈size / W⌉; what the last workers lack
is padding. A divided parameter itself is empty. DeepSpeed gathers the parameters of a layer while the layer runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cllm4rec.config import TrainingConfig
from cllm4rec.model.divided import is_divided
from cllm4rec.training.shares import Share, Value, bounds, share_of, whole


def divides(training: TrainingConfig) -> bool:
    """Whether the workers of a run divide parameters."""
    return training.engine == "deepspeed" and training.zero_stage == 3


def local_device() -> torch.device:
    """The device on which this worker computes."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def divide(model: nn.Module, precisions: Mapping[str, torch.dtype], on_cpu: bool = False) -> None:
    """Keep only this worker's share of every parameter, in place. Every worker must call it.

    Parameters are converted, moved to the device and divided one after the other. If they are memory-mapped, a worker therefore
    never holds more than its shares and one parameter.
    precisions: of the parameters that are not to be in float32, by name. on_cpu: keep the shares in the memory of the CPU.
    """
    import deepspeed

    deepspeed.zero.Init(module=_OneByOne(model, precisions), remote_device="cpu" if on_cpu else None)
    model.to(local_device())  # buffers


class _OneByOne(nn.Module):
    """The parameters of a model, each converted at the moment when it is asked for."""

    def __init__(self, model: nn.Module, precisions: Mapping[str, torch.dtype]) -> None:
        super().__init__()
        self._named, self._precisions = dict(model.named_parameters()), precisions

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for name, weight in self._named.items():
            # A copy: DeepSpeed writes to it, which would read memory-mapped pages anew for each worker.
            weight.data = weight.data.to(local_device(), self._precisions.get(name, torch.float32), copy=True)
            yield weight


def limits(model: Any) -> dict[str, int]:
    """Settings of DeepSpeed, so that a worker has gathered about two layers of the language model at a time."""
    backbone = model.backbone
    two_layers = 2 * sum(whole_shape(weight).numel() for weight in backbone.parameters()) // backbone.num_layers
    return {
        "stage3_prefetch_bucket_size": two_layers // 2,
        "stage3_max_live_parameters": two_layers,
        "stage3_max_reuse_distance": two_layers,
    }


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of a parameter, divided or not."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def local_values(weight: Tensor) -> Tensor:
    """What this worker holds of a parameter: all of it, or its share, flat and with padding."""
    values: Tensor = weight.ds_tensor if is_divided(weight) else weight  # type: ignore[attr-defined]
    return values


def padded_share(value: Value, weight: Any) -> Tensor:
    """The share of this worker of a tensor in the shape of a divided parameter, padded with zeros, on its device."""
    flat = own_share(value).values.to(weight.ds_tensor.device)
    return nn.functional.pad(flat, (0, weight.ds_tensor.ds_numel - len(flat)))


def own_share(value: Value) -> Share:
    """The share of this worker of a tensor."""
    return share_of(value, dist.get_rank(), dist.get_world_size())


def as_share(padded: Tensor, weight: nn.Parameter) -> Share:
    """A copy, on the CPU, of what this worker holds of a tensor in the shape of a divided parameter."""
    shape = whole_shape(weight)
    begin, end = bounds(shape.numel(), dist.get_rank(), dist.get_world_size())
    return Share(padded.detach().flatten()[: end - begin].cpu().clone(), shape)


@torch.no_grad()
def set_values(weight: nn.Parameter, value: Value) -> None:
    """Set a parameter to the values of a tensor in its shape: all of it, or this worker's share."""
    if is_divided(weight):
        local_values(weight).copy_(padded_share(value, weight))
    else:
        weight.copy_(whole(value))


@contextlib.contextmanager
def gathered(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """All values of some divided parameters, on every worker, for the time of a block that only reads them."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(weights)):
        yield


class TrainsAndRanks(nn.Module):
    """Wraps a model so that its hidden states, too, are a forward pass of the outermost module, which DeepSpeed requires."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, hidden_states: bool = False) -> Any:
        module: Any = self.module
        return module.hidden_states(*inputs) if hidden_states else module(*inputs)
