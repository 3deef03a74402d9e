"""How long a phase will take, found before its first epoch from two passes over one batch. Nothing is learned from them."""

from __future__ import annotations

import time

import numpy as np
import torch

from cllm4rec.data.documents import TEXT_KINDS, Documents
from cllm4rec.metrics.protocol import Validation
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.packing import Packer, PairPacker
from cllm4rec.training.epochs import EpochBuilder
from cllm4rec.training.phases import Phase

_DOCUMENTS = 1024
"""Of each kind, at most: enough to fill a batch."""
_FORWARD_SHARE = 1 / 3
"""Of a training pass is what ranking a token takes: one product of three."""


def seconds_per_epoch(
    model: CLLM4Rec,
    phase: Phase,
    documents: Documents,
    validation: Validation | None,
    builder: EpochBuilder,
    packer: Packer | PairPacker,
) -> float | None:
    """About how long this worker takes for an epoch, validation included; None where it has no documents."""
    sample = documents.take(_some_of_each_kind(phase, documents))
    batches = [packer.batches(parts) for parts, _ in phase.streams(builder, sample, 0)]
    first = [batch for stream in batches if (batch := next(stream, None)) is not None and batch.num_tokens]
    if not first:
        return None
    device = model.collaborative_items.device
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    seconds = 0.0
    for _ in range(2):  # the first go warms up: kernels, layouts of weights, memory
        began = time.monotonic()
        for batch in first:
            losses = model(batch_to_device(batch, device), phase.lambda_c)
            torch.autograd.grad(losses.total, trained, allow_unused=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
    per_token = seconds / sum(batch.num_tokens for batch in first)
    ranked = validation.read.lengths.sum() if validation is not None and phase.validate else 0
    return float(per_token * (_tokens(phase, documents, builder.max_tokens) + _FORWARD_SHARE * ranked))


def _some_of_each_kind(phase: Phase, documents: Documents) -> np.ndarray:
    rows = [documents.rows_of([kind])[:_DOCUMENTS] for kind in sorted(phase.kinds)]
    return np.concatenate([np.empty(0, np.int64), *rows])


def _tokens(phase: Phase, documents: Documents, max_tokens: int) -> float:
    """Of one epoch, about: texts by the share that is read, histories up to the longest document."""
    lengths = np.minimum(documents.lengths, max_tokens)
    is_text = np.isin(documents.kind, TEXT_KINDS)
    is_read = np.isin(documents.kind, list(phase.kinds))
    return float(lengths[is_read & ~is_text].sum() + phase.text_fraction * lengths[is_read & is_text].sum())
