"""Losses as pure functions of tensors.

Lengths: P predictions, J rows of a table (items or words), K hidden size, E targets (several may share a prediction).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

# Logits held at once, whatever the catalogue: with fewer the products become too thin.
_MAX_LOGITS = 1 << 25
# On a CPU all passes over the logits after their product are made by parts that stay in its cache: 2^19 float32 are 2 MB.
_CACHED_LOGITS = 1 << 19
# Predictions are filled up to a multiple of this, so that products have few shapes: a CPU keeps a kernel for each.
_STEP = 64


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
        num_predictions = len(hidden_PK)
        hidden_PK = torch.nn.functional.pad(hidden_PK.to(precision), (0, 0, 0, -num_predictions % _STEP))
        table_JK = table_JK.to(precision)
        grad_hidden = torch.empty_like(hidden_PK) if wants_hidden else None
        grad_table = torch.zeros(table_JK.shape, device=table_JK.device) if wants_table else None
        loss = torch.zeros((), device=hidden_PK.device)
        targets = _Targets.of(len(hidden_PK), target_rows_E, targets_E)
        chunk = max(1, _MAX_LOGITS // len(table_JK))
        part = max(1, _CACHED_LOGITS // len(table_JK)) if hidden_PK.device.type == "cpu" else chunk
        for begin in range(0, len(hidden_PK), chunk):
            end = min(begin + chunk, len(hidden_PK))
            product = hidden_PK[begin:end] @ table_JK.T
            for first in range(begin, end, part):
                last = min(first + part, end)
                loss += _turn_to_gradient(product[first - begin : last - begin], targets.between(first, last))
            if grad_hidden is not None:
                grad_hidden[begin:end] = product @ table_JK
            if grad_table is not None:
                grad_table += product.T @ hidden_PK[begin:end]
        if grad_hidden is not None:
            grad_hidden = grad_hidden[:num_predictions]
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


@dataclasses.dataclass(frozen=True)
class _Targets:
    """E targets of P predictions: ascending rows and columns of the logits, and how many each row has."""

    rows_E: Tensor
    columns_E: Tensor
    times_P: Tensor
    ends: list[int]
    """Of the targets of each row."""

    @classmethod
    def of(cls, num_rows: int, rows_E: Tensor, columns_E: Tensor) -> _Targets:
        times_P = torch.bincount(rows_E, minlength=num_rows)
        return cls(rows_E, columns_E, times_P.float(), times_P.cumsum(0).tolist())

    def between(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows from `first` on, columns and counts of the targets of a range of rows."""
        of = slice(self.ends[first - 1] if first else 0, self.ends[last - 1])
        return self.rows_E[of] - first, self.columns_E[of], self.times_P[first:last]


def _turn_to_gradient(logits_PJ: Tensor, targets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The loss of these logits, in whose place d loss / d logits = times · softmax - counts of targets is put."""
    rows, columns, times_P = targets
    work = logits_PJ.to(torch.float32, copy=True)
    work -= work.amax(dim=1, keepdim=True)
    of_targets = work[rows, columns]
    sums_P = work.exp_().sum(dim=1)
    loss = (times_P * sums_P.log()).sum() - of_targets.sum()
    work *= (times_P / sums_P)[:, None]
    work.index_put_((rows, columns), work.new_full((), -1.0), accumulate=True)
    logits_PJ.copy_(work)
    return loss


def squared_distance(left_UK: Tensor, right_UK: Tensor, times_U: Tensor) -> Tensor:
    """sum over rows of times · ||left - right||²: the penalty of Eq. 7, 8 and 10 before lambda_c / 2."""
    return ((left_UK - right_UK).square().sum(dim=1) * times_U).sum()
