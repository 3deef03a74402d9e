"""Estimates the duration of a phase before its first epoch from a few passes over one batch. They change no weights."""

from __future__ import annotations

import statistics
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
from cllm4rec.typing import IntArray

_SAMPLE_DOCUMENTS = 1024
"""Documents sampled per kind, at most. Enough to fill a batch."""
_MIN_PASSES, _MAX_PASSES = 3, 7
"""Timed passes. On a busy machine a single one may take several times as long as the others."""
_ENOUGH_S = 2.0
"""No more than _MIN_PASSES start after this many seconds of timed ones: those of a large model are long and vary less."""
_FORWARD_SHARE = 1 / 3
"""The cost of ranking a token relative to training on it: one of three matrix products."""


def seconds_per_epoch(
    model: CLLM4Rec,
    phase: Phase,
    documents: Documents,
    validation: Validation | None,
    builder: EpochBuilder,
    packer: Packer | PairPacker,
) -> float | None:
    """The estimated duration of an epoch on this worker, validation included, or None if it has no documents."""
    sample = documents.take(_sample_rows(phase, documents))
    streams = [packer.batches(parts) for parts, _ in phase.streams(builder, sample, 0)]
    batches = [batch for stream in streams if (batch := next(stream, None)) is not None and batch.num_tokens]
    if not batches:
        return None
    device = model.collaborative_items.device
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    passes: list[float] = []
    # The first pass is a warm-up: kernel caches, prepacked weights, memory.
    while len(passes) <= _MIN_PASSES or (len(passes) <= _MAX_PASSES and sum(passes[1:]) < _ENOUGH_S):
        started = time.monotonic()
        for batch in batches:
            losses = model(batch_to_device(batch, device), phase.lambda_c)
            torch.autograd.grad(losses.total, trained, allow_unused=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        passes.append(time.monotonic() - started)
    seconds_per_token = statistics.median(passes[1:]) / sum(batch.num_tokens for batch in batches)
    ranked_tokens = validation.read.lengths.sum() if validation is not None and phase.validate else 0
    trained_tokens = _epoch_tokens(phase, documents, builder.max_tokens)
    return float(seconds_per_token * (trained_tokens + _FORWARD_SHARE * ranked_tokens))


def _sample_rows(phase: Phase, documents: Documents) -> IntArray:
    """The first documents of each kind that the phase reads."""
    rows = [documents.rows_of([kind])[:_SAMPLE_DOCUMENTS] for kind in sorted(phase.kinds)]
    return np.concatenate([np.empty(0, np.int64), *rows])


def _epoch_tokens(phase: Phase, documents: Documents, max_tokens: int) -> float:
    """The approximate number of tokens of an epoch: the sampled fraction of texts, and histories up to `max_tokens`."""
    lengths = np.minimum(documents.lengths, max_tokens)
    is_text = np.isin(documents.kind, TEXT_KINDS)
    is_read = np.isin(documents.kind, list(phase.kinds))
    return float(lengths[is_read & ~is_text].sum() + phase.text_fraction * lengths[is_read & is_text].sum())
