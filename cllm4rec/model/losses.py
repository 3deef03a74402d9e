"""Losses as pure functions of tensors.

Lengths: P predictions, J rows of a table (items or words), K hidden size, E targets (several may share a prediction).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Of the logits held at once, whatever the catalog and the vocabulary, and as much again while softmax is made. With a quarter
# their products are too thin: a text step of GPT-2 small takes 5 % longer.
_LOGITS_BYTES = 1 << 28
# A probability below is taken for this one in the loss, whose gradient stays: the smallest normal number of both precisions.
_LEAST = torch.finfo(torch.float32).tiny
# Predictions are filled up to a multiple of this, so that products have few shapes: a CPU keeps a kernel for each.
_STEP = 64


def tied_cross_entropy(
    hidden_PK: Tensor,
    table_JK: Tensor,
    target_rows_E: Tensor,
    targets_E: Tensor,
    precision: torch.dtype | None = None,
    bias_J: Tensor | None = None,
) -> Tensor:
    """-sum over targets of log softmax(Z h)[target]: Eq. 7 and 8 with one target a prediction, Eq. 9 with many.

    target_rows_E says which prediction each target belongs to, ascending. Products and softmax are made in `precision`, by
    default that of `hidden_PK`; the sum, of shape (), and the table's gradient are float32. A target whose probability no
    float32 holds counts 87.3, and its gradient is whole. Gradients are made in the forward pass, chunk by chunk, so no more
    than a chunk of logits ever exists. A table that needs no gradient (the frozen word embeddings) costs no product for it.

    bias_J: added to every logit but those of a prediction's own targets. With a sampled softmax `table_JK` holds the items
    that were drawn and all targets, and the bias is -log of the chance to be drawn (-inf for targets that were not).
    """
    loss: Tensor = _TiedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_PK, table_JK, target_rows_E, targets_E, precision or hidden_PK.dtype, bias_J
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
    ) -> Tensor:
        wants_hidden, wants_table = ctx.needs_input_grad[:2]
        num_predictions = len(hidden_PK)
        hidden_PK = torch.nn.functional.pad(hidden_PK.to(precision), (0, 0, 0, -num_predictions % _STEP))
        table_JK = table_JK.to(precision)
        num_targets_P = torch.bincount(target_rows_E, minlength=len(hidden_PK))
        target_ends, times_P1 = num_targets_P.cumsum(0).tolist(), num_targets_P.to(precision)[:, None]
        grad_hidden = torch.empty_like(hidden_PK) if wants_hidden else None
        grad_table_KJ = torch.zeros(table_JK.T.shape, device=table_JK.device) if wants_table else None
        loss = torch.zeros((), device=hidden_PK.device)
        chunk = max(1, _LOGITS_BYTES // (len(table_JK) * table_JK.element_size()))
        for begin in range(0, len(hidden_PK), chunk):
            end = min(begin + chunk, len(hidden_PK))
            hidden, times = hidden_PK[begin:end], times_P1[begin:end]
            targets = slice(target_ends[begin - 1] if begin else 0, target_ends[end - 1])
            where = (target_rows_E[targets] - begin, targets_E[targets])
            # d loss / d logits = times · (softmax - targets / times): times are put to the smaller side of each product.
            logits = hidden @ table_JK.T
            if bias_J is not None:
                own = logits[where]
                logits += bias_J.to(precision)
                logits[where] = own
            gradient = logits.softmax(dim=1)
            loss -= gradient[where].float().clamp_min(_LEAST).log().sum()
            gradient.index_put_(where, -times[where[0], 0].reciprocal(), accumulate=True)
            if grad_hidden is not None:
                grad_hidden[begin:end] = (gradient @ table_JK).mul_(times)
            if grad_table_KJ is not None:
                # Not gradient.T @ hidden, which takes nearly twice as long on a CPU.
                grad_table_KJ += (hidden * times).T.contiguous() @ gradient
        if grad_hidden is not None:
            grad_hidden = grad_hidden[:num_predictions]
        ctx.save_for_backward(grad_hidden, grad_table_KJ)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        grad_hidden, grad_table_KJ = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_table_KJ is None else grad_table_KJ.T.contiguous().mul_(scale.to(grad_table_KJ.dtype)),
            *[None] * 4,
        )


def squared_distance(left_UK: Tensor, right_UK: Tensor, times_U: Tensor) -> Tensor:
    """sum over rows of times · ||left - right||²: the penalty of Eq. 7, 8 and 10 before lambda_c / 2."""
    return ((left_UK - right_UK).square().sum(dim=1) * times_U).sum()
