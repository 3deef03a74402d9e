"""The memory of a training worker and of a scoring process, part by part, before anything is loaded.

    plan = training_memory(config, sizes, "cuda")
    plan.total, plan.parts["ID tables"]

Weights and activations are counted on torch's meta device, on which tensors have shapes and no memory. The other parts follow
from the sizes of the tables.

Shapes: I users, J items, D width of the ID tables, P parameters of the language model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm4rec.config import Config
from cllm4rec.errors import ResourceError
from cllm4rec.model.accelerate import accelerate
from cllm4rec.model.adapter import add_adapter, is_adapter
from cllm4rec.model.attention import DocumentLayout
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.backbone_files import empty_backbone
from cllm4rec.model.batch import TensorGrid
from cllm4rec.model.cpu.fused import FrozenLinear, can_prepack
from cllm4rec.model.losses import LOGITS_BYTES
from cllm4rec.model.precision import precision_on
from cllm4rec.training.engine import bucket_elements
from cllm4rec.training.schedule import MAX_BATCH_TOKENS

_FLOAT32 = 4
_LIBRARIES = {"cpu": 700 << 20, "cuda": 600 << 20}
"""What a process takes before it loads a model: torch, transformers, DeepSpeed and Ray; on a GPU the CUDA context."""
_DOCUMENT_TOKENS = 32
"""The length of the documents for which activations are counted."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers of users, items and words of the tokenizer."""

    users: int
    items: int
    words: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, at the moment when a process has the most."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def training_memory(config: Config, sizes: Sizes, device: str) -> MemoryPlan:
    """The memory of a worker that pretrains, on its `device` ("cpu" or "cuda")."""
    training, workers = config.training, config.cluster.num_workers
    backbone = _meta_backbone(config, sizes, device)
    stage = training.zero_stage if training.engine == "deepspeed" else 0
    width = config.model.id_width or backbone.width
    user_bytes, item_bytes = (2 * rows * width * _FLOAT32 for rows in (sizes.users, sizes.items))
    divided_by = {part: workers if stage >= first else 1 for first, part in ((1, "adam"), (3, "weights"))}
    # Each worker steps the rows of its own users alone, unless something needs their whole gradients (`loop`).
    is_row_wise = stage < 3 and not config.pretrain.alternate and training.gradient_clipping is None
    if is_row_wise:
        user_gradients, user_adam = 0, 2 * user_bytes // workers
    else:
        user_gradients, user_adam = user_bytes, 2 * user_bytes // divided_by["adam"]
    adapter_bytes = sum(_bytes(weight) for name, weight in backbone.named_parameters() if is_adapter(name))
    weights = sum(_bytes(weight) for name, weight in backbone.named_parameters() if not is_adapter(name))
    slots = training.micro_batch_tokens or MAX_BATCH_TOKENS
    activations = _activation_bytes(backbone, slots, training.gradient_checkpointing)
    parts = {
        "language model": weights // divided_by["weights"],
        "adapter, with gradients and Adam": 4 * adapter_bytes,
        "ID tables": (user_bytes + item_bytes) // divided_by["weights"],
        # Whole at every stage: a backward pass gives the gradient of a whole table before DeepSpeed divides it.
        "gradients of ID tables": item_bytes + user_gradients,
        "Adam": 2 * item_bytes // divided_by["adam"] + user_adam,
        f"activations of {slots:,} tokens": activations,
        "logits": 3 * min(LOGITS_BYTES, slots * max(sizes.items, sizes.words) * backbone.dtype.itemsize),
        "libraries": _LIBRARIES[device],
    }
    if stage > 0:
        trained = adapter_bytes + user_bytes * (not is_row_wise) + item_bytes
        parts["DeepSpeed's copies of its share"] = (1 if stage == 1 else 2) * trained // workers
        parts["DeepSpeed's buffer of gradients"] = _FLOAT32 * bucket_elements(trained // _FLOAT32)
    if stage == 3:
        words = {id(table): table for table in (backbone.word_embeddings, backbone.word_head.table_NK)}
        parts["gathered layers"] = min(weights, 2 * weights // backbone.num_layers + sum(map(_bytes, words.values())))
        parts["gathered ID tables"] = user_bytes + item_bytes
    if training.cpu_offload and stage > 0 and device == "cuda":
        # The host has them. Adam's state of user rows that are stepped one by one stays.
        parts["Adam"] = user_adam if is_row_wise else 0
        parts["DeepSpeed's copies of its share"] = 0
        if stage == 3:
            parts["language model"] = parts["ID tables"] = 0
    if device == "cpu":
        parts["best epoch and checkpoint"] = 2 * (user_bytes + item_bytes) // divided_by["weights"]
        parts["weights packed for validation"] = 0 if stage == 3 else _packed_bytes(backbone)
    return MemoryPlan({name: number for name, number in parts.items() if number})


def scoring_memory(config: Config, sizes: Sizes, device: str) -> MemoryPlan:
    """The memory of a scoring actor or of a replica of the endpoint."""
    backbone = _meta_backbone(config, sizes, device)
    width = config.model.id_width or backbone.width
    parts = {
        "language model": sum(_bytes(weight) for name, weight in backbone.named_parameters() if not is_adapter(name)),
        "ID tables": 2 * (sizes.users + sizes.items) * width * _FLOAT32,
        "libraries": _LIBRARIES[device],
    }
    if device == "cpu":
        parts["weights packed for products"] = _packed_bytes(backbone)
    return MemoryPlan(parts)


def check_memory(plan: MemoryPlan, available: int, what: str) -> None:
    """Raise ResourceError if a process of this plan does not fit. what: the process, such as "a training worker"."""
    if plan.total > available:
        largest = max(plan.parts, key=lambda name: plan.parts[name])
        raise ResourceError(
            f"{what} needs about {plan.total / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free; the largest part is "
            f"{largest} with {plan.parts[largest] / 2**30:.1f} GiB: {_REMEDIES.get(largest, _REMEDY)}"
        )


_REMEDY = "lower training.micro_batch_tokens or set training.gradient_checkpointing"
_REMEDIES = {
    "language model": "use a smaller model.backbone",
    "gathered ID tables": "set model.id_width, or training.zero_stage=2",
    "ID tables": "set model.id_width",
    "best epoch and checkpoint": "set model.id_width",
    "Adam": "set model.id_width, or training.zero_stage=1 with several workers",
}


def _meta_backbone(config: Config, sizes: Sizes, device: str) -> Backbone:
    """The backbone as a frozen model of the precision of a device, without memory for its weights."""
    backbone = empty_backbone(config.model, sizes.words)
    if config.backbone.trains_adapter("pretrain") and config.backbone.adapter is not None:
        with torch.device("meta"):
            add_adapter(backbone, config.backbone.adapter, 0)
    else:
        backbone.requires_grad_(False)
    accelerate(backbone, _precision(device, config.training.bf16))
    return backbone


def _activation_bytes(backbone: Backbone, slots: int, checkpointing: bool) -> int:
    """The memory that the forward pass of one micro-batch keeps for the backward pass."""
    if checkpointing:
        backbone.checkpoint_layers()
    own = {weight.untyped_storage()._cdata for weight in backbone.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    grids: tuple[TensorGrid, ...]
    if backbone.is_encoder_decoder:  # half of each document in either part
        grids = tuple(_grid(slots // _DOCUMENT_TOKENS, _DOCUMENT_TOKENS // 2) for _ in range(2))
    else:
        grids = (_grid(1, slots),)
    vectors = tuple(
        torch.zeros(*grid.segment_RT.shape, backbone.width, dtype=backbone.dtype, device="meta", requires_grad=True)
        for grid in grids
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone(vectors, grids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _FullGrid(TensorGrid):
    """A grid without padding, which needs no mask: transformers would read its values."""

    def is_token(self) -> None:  # type: ignore[override]
        return None


def _grid(rows: int, columns: int) -> TensorGrid:
    segment = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns) // _DOCUMENT_TOKENS + 1
    layout = DocumentLayout(segment, torch.device("meta"))
    on_meta = torch.zeros(rows, columns, dtype=torch.int64, device="meta")
    return _FullGrid(on_meta, on_meta, {}, layout)


def _precision(device: str, bf16: bool) -> torch.dtype:
    if device == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16 if bf16 else torch.float32  # a plan for GPUs that this machine lacks
    return precision_on(device, bf16)


def _packed_bytes(backbone: Backbone) -> int:
    """A CPU multiplies with a second, rearranged copy of each matrix (`cpu.fused`)."""
    layers = [layer for layer in backbone.modules() if isinstance(layer, FrozenLinear)]
    return sum(_bytes(layer.weight) for layer in layers) if can_prepack(backbone.dtype) else 0


def _bytes(weight: Any) -> int:
    return int(weight.numel() * weight.element_size())
