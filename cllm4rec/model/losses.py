"""Losses as pure functions of tensors.

Lengths: P predictions, J rows of a table (items or words), K hidden size, E targets (several may share a prediction).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits held at once. 2^23 float32 are 32 MB, whatever the catalogue: on a CPU the passes over them after the product are
# twice as fast as with 128 MB, and with less the products become too thin.
_MAX_LOGITS = 1 << 23


def tied_cross_entropy(
    hidden_PK: Tensor, table_JK: Tensor, target_rows_E: Tensor, targets_E: Tensor, precision: torch.dtype | None = None
) -> Tensor:
    """-sum over targets of log softmax(Z h)[target]: Eq. 7 and 8 with one target a prediction, Eq. 9 with many.

    target_rows_E says which prediction each target belongs to, ascending. Products are made in `precision`, by default
    that of `hidden_PK`; softmax, sum and the table's gradient are float32. The sum has shape ().
    Gradients are made in the forward pass, chunk by chunk, so no more than a chunk of logits ever exists. A table
    that needs no gradient (the frozen word embeddings) costs no product for it.
    """
    loss: Tensor = _TiedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_PK, table_JK, target_rows_E, targets_E, precision or hidden_PK.dtype
    )
    return loss


class _TiedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_PK: Tensor, table_JK: Tensor, target_rows_E: Tensor, targets_E: Tensor, precision: torch.dtype
    ) -> Tensor:
        wants_hidden, wants_table = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_PK) if wants_hidden else None
        grad_table = torch.zeros_like(table_JK, dtype=torch.float32) if wants_table else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_PK.device)
        hidden_PK, table_JK = hidden_PK.to(precision), table_JK.to(precision)
        chunk = max(1, _MAX_LOGITS // len(table_JK))
        times_P = torch.bincount(target_rows_E, minlength=len(hidden_PK)).float()
        bounds = torch.searchsorted(
            target_rows_E, torch.arange(0, len(hidden_PK) + chunk, chunk, device=target_rows_E.device)
        )
        for number, begin in enumerate(range(0, len(hidden_PK), chunk)):
            end = min(begin + chunk, len(hidden_PK))
            targets = slice(int(bounds[number]), int(bounds[number + 1]))
            rows, columns = target_rows_E[targets] - begin, targets_E[targets]
            product = hidden_PK[begin:end] @ table_JK.T
            # From here on in place: each pass over the logits costs as much as a good part of the product.
            logits = product.float()
            logits -= logits.amax(dim=1, keepdim=True)
            of_targets = logits[rows, columns]
            sums_P = logits.exp_().sum(dim=1)
            loss += (times_P[begin:end] * sums_P.log()).sum() - of_targets.sum()
            if not (wants_hidden or wants_table):
                continue
            # d loss / d logits = times · softmax - counts of targets.
            logits *= (times_P[begin:end] / sums_P)[:, None]
            logits.index_put_((rows, columns), logits.new_full((), -1.0), accumulate=True)
            grad = logits if product is logits else product.copy_(logits)
            if grad_hidden is not None:
                grad_hidden[begin:end] = grad @ table_JK
            if grad_table is not None:
                grad_table += grad.T @ hidden_PK[begin:end]
        ctx.save_for_backward(grad_hidden, grad_table)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        scale = grad_outputs[0]
        grad_hidden, grad_table = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_table is None else grad_table * scale.to(grad_table.dtype),
            None,
            None,
            None,
        )


def squared_distance(left_UK: Tensor, right_UK: Tensor, times_U: Tensor) -> Tensor:
    """sum over rows of times · ||left - right||²: the penalty of Eq. 7, 8 and 10 before lambda_c / 2."""
    return ((left_UK - right_UK).square().sum(dim=1) * times_U).sum()
