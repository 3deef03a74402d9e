"""Adam for tables of which a step reads few rows: a row is brought up to date when it is read again.

Dense Adam also moves rows without a gradient, as their moments die out. Without one from step t on, step s has

    m_s = beta1^(s-t) m,   v_s = beta2^(s-t) v,   move_s = lr m_s / (1 - beta1^s) / (sqrt(v_s / (1 - beta2^s)) + eps)

and with rho = beta1 / sqrt(beta2) and b_s = sqrt(1 - beta2^s) / (1 - beta1^s) the steps that a row missed come to

    lr m / sqrt(v) · sum over s of rho^(s-t) b_s

but for eps, which enters at its mean over these steps. So a step costs what its rows cost, however long the tables are.

Lengths: I rows of a table, V of them owned, U read by a step, D distinct steps at which rows were last up to date, W terms
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
# rho^200 is 8e-10: later terms are lost in float32.
_NUM_TERMS = 200
_FLUSH_ROWS = 65_536


class RowAdam:
    """Steps rows of tables of one length as `torch.optim.Adam` steps all of them. All tables are read at the same rows.

    tables: (I, K) each, stepped in place; what they hold is right for rows just read, and for all owned after `flush`.
    owned_V: the rows that may be read, ascending. Moments are kept for these alone.
    """

    def __init__(self, tables: Mapping[str, Tensor], owned_V: Tensor, learning_rate: float) -> None:
        self.tables, self.owned_V, self.learning_rate = dict(tables), owned_V, learning_rate
        self.num_steps = 0
        self.moments_VK = {
            name: {moment: table.new_zeros(len(owned_V), table.shape[1]) for moment in MOMENTS}
            for name, table in tables.items()
        }
        self._last_V = torch.zeros_like(owned_V)
        """The step each row is up to date with."""
        self._read: list[tuple[Tensor, dict[str, Tensor]]] = []

    @torch.no_grad()
    def read(self, rows_U: Tensor) -> dict[str, Tensor]:
        """Each table's rows as of now, (U, K), as leaves that collect the gradients of the step to come."""
        places_U = torch.searchsorted(self.owned_V, rows_U).clamp(max=len(self.owned_V) - 1)
        assert torch.equal(self.owned_V[places_U], rows_U), "a user's documents are all on the worker that owns its row"
        self._catch_up(places_U)
        leaves = {name: table.index_select(0, rows_U).requires_grad_() for name, table in self.tables.items()}
        self._read.append((places_U, leaves))
        return leaves

    @torch.no_grad()
    def step(self, gradient_scale: float = 1.0) -> None:
        """Adam's step of the rows read since the last one. `gradient_scale`: what the leaves' gradients are divided by."""
        places_U, inverse = torch.unique(
            torch.cat([self._last_V[:0], *(places for places, _ in self._read)]), return_inverse=True
        )
        if len(places_U):
            for name, table in self.tables.items():
                # A user may be read by several micro batches.
                gradient_UK = table.new_zeros(len(places_U), table.shape[1])
                gradient_UK.index_add_(0, inverse, torch.cat([_gradient(leaves[name]) for _, leaves in self._read]))
                self._step(name, places_U, gradient_UK / gradient_scale)
        self.num_steps += 1
        self._last_V[places_U] = self.num_steps
        self._read.clear()

    @torch.no_grad()
    def flush(self) -> None:
        """Bring all owned rows up to date: one pass over the tables."""
        for places in torch.split(torch.arange(len(self.owned_V), device=self.owned_V.device), _FLUSH_ROWS):
            self._catch_up(places)

    @torch.no_grad()
    def load(self, moments_IK: Mapping[str, Mapping[str, Tensor]], num_steps: int) -> None:
        """Go on from tables and moments, (I, K) each, that are up to date with `num_steps` steps."""
        for name, moments in self.moments_VK.items():
            for moment, kept_VK in moments.items():
                kept_VK.copy_(moments_IK[name][moment].index_select(0, self.owned_V.cpu()))
        self.num_steps = num_steps
        self._last_V.fill_(num_steps)

    def _step(self, name: str, places_U: Tensor, gradient_UK: Tensor) -> None:
        rows_U, moments = self.owned_V[places_U], self.moments_VK[name]
        value_UK = self.tables[name].index_select(0, rows_U)
        first_UK, second_UK = (moments[moment].index_select(0, places_U) for moment in MOMENTS)
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
        self._write(name, places_U, value_UK, first_UK, second_UK)

    def _catch_up(self, places_U: Tensor) -> None:
        """Take the steps that rows have missed, without a gradient."""
        places_U = places_U[self._last_V[places_U] < self.num_steps]
        if not len(places_U):
            return
        last_D, which_U = torch.unique(self._last_V[places_U], return_inverse=True)
        missed = _Missed.steps(last_D, self.num_steps)
        reach, eps, first_decay, second_decay = (each.float()[which_U, None] for each in missed)
        for name, table in self.tables.items():
            value_UK = table.index_select(0, self.owned_V[places_U])
            first_UK, second_UK = (self.moments_VK[name][moment].index_select(0, places_U) for moment in MOMENTS)
            value_UK -= self.learning_rate * reach * first_UK / (second_UK.sqrt() + eps)
            self._write(name, places_U, value_UK, first_UK * first_decay, second_UK * second_decay)
        self._last_V[places_U] = self.num_steps

    def _write(self, name: str, places_U: Tensor, value_UK: Tensor, first_UK: Tensor, second_UK: Tensor) -> None:
        self.tables[name].index_copy_(0, self.owned_V[places_U], value_UK)
        for moment, changed_UK in zip(MOMENTS, (first_UK, second_UK), strict=True):
            self.moments_VK[name][moment].index_copy_(0, places_U, changed_UK)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "every read is followed by a backward of its loss"
    return leaf.grad


class _Missed(NamedTuple):
    """What steps without a gradient do to a row: (D,) each. It moves by -lr · reach · m / (sqrt(v) + eps)."""

    reach: Tensor
    eps: Tensor
    first_decay: Tensor
    second_decay: Tensor

    @classmethod
    def steps(cls, last_D: Tensor, now: int) -> _Missed:
        """The steps after `last_D`, up to and with `now`; at least one each."""
        beta1, beta2 = BETAS
        ahead_W = torch.arange(1, _NUM_TERMS + 1, dtype=torch.float64, device=last_D.device)
        step_DW = last_D.double()[:, None] + ahead_W
        root_DW = (1 - beta2**step_DW).sqrt()
        weight_DW = (beta1 / beta2**0.5) ** ahead_W * root_DW / (1 - beta1**step_DW) * (step_DW <= now)
        reach_D = weight_DW.sum(dim=1)
        eps_D = EPS * (weight_DW * root_DW / beta2 ** (ahead_W / 2)).sum(dim=1) / reach_D
        missed_D = now - last_D.double()
        return cls(reach_D, eps_D, beta1**missed_D, beta2**missed_D)
