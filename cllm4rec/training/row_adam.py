"""Lazy Adam for tables of which each step reads few rows: a row catches up on missed steps when it is read again.

Dense Adam also moves rows without a gradient while their moments decay. Without a gradient after step t, step s has

    m_s = beta1^(s-t) m,   v_s = beta2^(s-t) v,   move_s = lr m_s / (1 - beta1^s) / (sqrt(v_s / (1 - beta2^s)) + eps)

and with rho = beta1 / sqrt(beta2) and b_s = sqrt(1 - beta2^s) / (1 - beta1^s) the missed steps of a row sum to

    lr m / sqrt(v) · sum over s of rho^(s-t) b_s

except for eps, for which its mean over these steps is used. The cost of a step is therefore proportional to the rows that it
reads and does not depend on the size of the tables.

Shapes: I rows of a table, V owned rows, U rows read by a step, D distinct steps at which rows were last up to date, W terms
of the sum, K hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

BETAS = (0.9, 0.999)
EPS = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")
# rho^200 is 8e-10: later terms vanish in float32.
_NUM_TERMS = 200
_FLUSH_ROWS = 65_536


class RowAdam:
    """Steps rows as `torch.optim.Adam` would step whole tables. All tables have the same length and are read at the same rows.

    tables: (I, K) each, stepped in place. Rows are up to date right after `read`, and all owned rows after `flush`.
    owned_V: the rows that may be read, ascending. Moments exist only for these.
    """

    def __init__(self, tables: Mapping[str, Tensor], owned_V: Tensor, learning_rate: float) -> None:
        self.tables, self.owned_V, self.learning_rate = dict(tables), owned_V, learning_rate
        self.num_steps = 0
        self.moments_VK = {
            name: {moment: table.new_zeros(len(owned_V), table.shape[1]) for moment in MOMENTS}
            for name, table in tables.items()
        }
        self._last_V = torch.zeros_like(owned_V)
        """The step up to which each row is up to date."""
        self._reads: list[tuple[Tensor, dict[str, Tensor]]] = []
        """The rows read since the last step, as positions in `owned_V`, and their leaves."""

    @torch.no_grad()
    def read(self, rows_U: Tensor) -> dict[str, Tensor]:
        """The current rows of each table, (U, K), as leaf tensors that collect the gradients of the next step."""
        index_U = torch.searchsorted(self.owned_V, rows_U).clamp(max=len(self.owned_V) - 1)
        assert torch.equal(self.owned_V[index_U], rows_U), "a user's documents are all on the worker that owns its row"
        self._catch_up(index_U)
        leaves = {name: table.index_select(0, rows_U).requires_grad_() for name, table in self.tables.items()}
        self._reads.append((index_U, leaves))
        return leaves

    @torch.no_grad()
    def step(self, gradient_scale: float = 1.0) -> None:
        """Step the rows read since the last step. gradient_scale: the divisor of the gradients of the leaves."""
        index_U, inverse = torch.unique(
            torch.cat([self._last_V[:0], *(index for index, _ in self._reads)]), return_inverse=True
        )
        if len(index_U):
            for name, table in self.tables.items():
                # Several micro-batches may read the same user.
                gradient_UK = table.new_zeros(len(index_U), table.shape[1])
                gradient_UK.index_add_(0, inverse, torch.cat([_gradient(leaves[name]) for _, leaves in self._reads]))
                self._step(name, index_U, gradient_UK / gradient_scale)
        self.num_steps += 1
        self._last_V[index_U] = self.num_steps
        self._reads.clear()

    @torch.no_grad()
    def flush(self) -> None:
        """Bring all owned rows up to date, in one pass over the tables."""
        for index in torch.split(torch.arange(len(self.owned_V), device=self.owned_V.device), _FLUSH_ROWS):
            self._catch_up(index)

    @torch.no_grad()
    def load(self, moments_IK: Mapping[str, Mapping[str, Tensor]], num_steps: int) -> None:
        """Load moments, (I, K) each. They and the tables are up to date with `num_steps` steps."""
        for name, moments in self.moments_VK.items():
            for moment, value_VK in moments.items():
                value_VK.copy_(moments_IK[name][moment].index_select(0, self.owned_V.cpu()))
        self.num_steps = num_steps
        self._last_V.fill_(num_steps)

    def _step(self, name: str, index_U: Tensor, gradient_UK: Tensor) -> None:
        rows_U, moments = self.owned_V[index_U], self.moments_VK[name]
        value_UK = self.tables[name].index_select(0, rows_U)
        first_UK, second_UK = (moments[moment].index_select(0, index_U) for moment in MOMENTS)
        adam(
            [value_UK],
            [gradient_UK],
            [first_UK],
            [second_UK],
            [],
            [torch.tensor(float(self.num_steps), device=value_UK.device)],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.learning_rate,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )
        self._write(name, index_U, value_UK, first_UK, second_UK)

    def _catch_up(self, index_U: Tensor) -> None:
        """Apply the steps without a gradient that rows have missed."""
        index_U = index_U[self._last_V[index_U] < self.num_steps]
        if not len(index_U):
            return
        last_D, distinct_U = torch.unique(self._last_V[index_U], return_inverse=True)
        missed = _MissedSteps.since(last_D, self.num_steps)
        factor, eps, first_decay, second_decay = (field_D.float()[distinct_U, None] for field_D in missed)
        for name, table in self.tables.items():
            value_UK = table.index_select(0, self.owned_V[index_U])
            first_UK, second_UK = (self.moments_VK[name][moment].index_select(0, index_U) for moment in MOMENTS)
            value_UK -= self.learning_rate * factor * first_UK / (second_UK.sqrt() + eps)
            self._write(name, index_U, value_UK, first_UK * first_decay, second_UK * second_decay)
        self._last_V[index_U] = self.num_steps

    def _write(self, name: str, index_U: Tensor, value_UK: Tensor, first_UK: Tensor, second_UK: Tensor) -> None:
        self.tables[name].index_copy_(0, self.owned_V[index_U], value_UK)
        for moment, moment_UK in zip(MOMENTS, (first_UK, second_UK), strict=True):
            self.moments_VK[name][moment].index_copy_(0, index_U, moment_UK)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "a backward pass follows every read"
    return leaf.grad


class _MissedSteps(NamedTuple):
    """The effect of missed steps on a row, (D,) each: the row moves by -lr · factor · m / (sqrt(v) + eps), moments decay."""

    factor: Tensor
    eps: Tensor
    first_decay: Tensor
    second_decay: Tensor

    @classmethod
    def since(cls, last_D: Tensor, now: int) -> _MissedSteps:
        """The steps after `last_D` up to and including `now`, at least one each."""
        beta1, beta2 = BETAS
        ahead_W = torch.arange(1, _NUM_TERMS + 1, dtype=torch.float64, device=last_D.device)
        step_DW = last_D.double()[:, None] + ahead_W
        root_DW = (1 - beta2**step_DW).sqrt()
        weight_DW = (beta1 / beta2**0.5) ** ahead_W * root_DW / (1 - beta1**step_DW) * (step_DW <= now)
        factor_D = weight_DW.sum(dim=1)
        eps_D = EPS * (weight_DW * root_DW / beta2 ** (ahead_W / 2)).sum(dim=1) / factor_D
        missed_D = now - last_D.double()
        return cls(factor_D, eps_D, beta1**missed_D, beta2**missed_D)
