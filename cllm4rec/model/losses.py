"""Losses as pure functions of tensors.

Shapes: P predictions, J rows of a table (items or words), K hidden size, E targets (several may share a prediction), U rows
of two tables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The size of a chunk of logits, for any catalog and vocabulary. Softmax needs as much again. With a quarter of it the
# matrix products are too small: a text step of GPT-2 small takes 5 % longer.
LOGITS_BYTES = 1 << 28
# The loss clamps probabilities to this; their gradient is not clamped. The smallest normal number of both precisions.
_MIN_PROBABILITY = torch.finfo(torch.float32).tiny
# Predictions are padded to a multiple of this, so that products have few distinct shapes: a CPU caches one kernel per shape.
_PREDICTIONS_STEP = 64


def tied_cross_entropy(
    hidden_PK: Tensor,
    table_JK: Tensor,
    target_rows_E: Tensor,
    targets_E: Tensor,
    precision: torch.dtype | None = None,
    bias_J: Tensor | None = None,
    offset_J: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """-sum over targets of log softmax(Z h)[target]: Eq. 7 and 8 with one target per prediction, Eq. 9 with several.

    target_rows_E: the prediction of each target, ascending.
    precision: of products and softmax, by default that of `hidden_PK`. The returned sum, of shape (), and the gradient of
    the table are float32.
    bias_J: added to all logits of a prediction except those of its own targets. In a sampled softmax, `table_JK` holds the
    sampled items and all targets, and the bias is -log of the sampling probability (-inf for targets not sampled).
    offset_J: added to all logits, as the bias of an output layer.
    softcap: logits become softcap · tanh(logits / softcap).

    Gradients are computed in the forward pass, chunk by chunk, so at most one chunk of logits exists at a time. A table that
    needs no gradient (the frozen word embeddings) costs no product for it. A target whose probability is below the smallest
    normal float32 counts as 87.3; its gradient is exact.
    """
    loss: Tensor = _TiedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_PK, table_JK, target_rows_E, targets_E, precision or hidden_PK.dtype, bias_J, offset_J, softcap
    )
    return loss


class _TiedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_PK: Tensor,
        table_JK: Tensor,
        target_rows_E: Tensor,
        targets_E: Tensor,
        precision: torch.dtype,
        bias_J: Tensor | None,
        offset_J: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        wants_hidden, wants_table, *_, wants_offset, _ = ctx.needs_input_grad
        num_predictions = len(hidden_PK)
        hidden_PK = torch.nn.functional.pad(hidden_PK.to(precision), (0, 0, 0, -num_predictions % _PREDICTIONS_STEP))
        table_JK = table_JK.to(precision)
        num_targets_P = torch.bincount(target_rows_E, minlength=len(hidden_PK))
        target_ends, counts_P1 = num_targets_P.cumsum(0).tolist(), num_targets_P.to(precision)[:, None]
        grad_hidden = torch.empty_like(hidden_PK) if wants_hidden else None
        grad_table_KJ = torch.zeros(table_JK.T.shape, device=table_JK.device) if wants_table else None
        grad_offset_J = torch.zeros(len(table_JK), device=table_JK.device) if wants_offset else None
        loss = torch.zeros((), device=hidden_PK.device)
        chunk = max(1, LOGITS_BYTES // (len(table_JK) * table_JK.element_size()))
        for begin in range(0, len(hidden_PK), chunk):
            end = min(begin + chunk, len(hidden_PK))
            hidden, counts = hidden_PK[begin:end], counts_P1[begin:end]
            targets = slice(target_ends[begin - 1] if begin else 0, target_ends[end - 1])
            target_index = (target_rows_E[targets] - begin, targets_E[targets])
            # d loss / d logits = counts · (softmax - targets / counts). Counts multiply the smaller factor of each product.
            logits = hidden @ table_JK.T
            if offset_J is not None:
                logits += offset_J.to(precision)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if bias_J is not None:
                target_logits = logits[target_index]
                logits += bias_J.to(precision)
                logits[target_index] = target_logits
            gradient = logits.softmax(dim=1)
            loss -= gradient[target_index].float().clamp_min(_MIN_PROBABILITY).log().sum()
            gradient.index_put_(target_index, -counts[target_index[0], 0].reciprocal(), accumulate=True)
            if softcap is not None:
                gradient *= 1 - (logits / softcap).square()
            if grad_offset_J is not None:
                grad_offset_J += (gradient * counts).float().sum(dim=0)
            if grad_hidden is not None:
                grad_hidden[begin:end] = (gradient @ table_JK).mul_(counts)
            if grad_table_KJ is not None:
                # gradient.T @ hidden would take nearly twice as long on a CPU.
                grad_table_KJ += (hidden * counts).T.contiguous() @ gradient
        if grad_hidden is not None:
            grad_hidden = grad_hidden[:num_predictions]
        ctx.save_for_backward(grad_hidden, grad_table_KJ, grad_offset_J)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        grad_hidden, grad_table_KJ, grad_offset_J = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_table_KJ is None else grad_table_KJ.T.contiguous().mul_(scale.to(grad_table_KJ.dtype)),
            *[None] * 4,
            None if grad_offset_J is None else grad_offset_J * scale,
            None,
        )


def squared_distance(left_UK: Tensor, right_UK: Tensor, counts_U: Tensor) -> Tensor:
    """sum over rows of count · ||left - right||²: the penalty of Eq. 7, 8 and 10 without its factor lambda_c / 2."""
    return ((left_UK - right_UK).square().sum(dim=1) * counts_U).sum()
