"""The training loop of all neural baselines. Each baseline is a `Network`: its layers and its loss.

Shapes: B users, J items, T positions of a history, W words, H width.
"""

from __future__ import annotations

import abc
import copy
import time
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional

from cllm4rec.arrays.ragged import Ragged, slices
from cllm4rec.errors import DataError, TrainingError
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.metrics.protocol import means, rank_with
from cllm4rec.metrics.ranking import depth
from cllm4rec.typing import IntArray

SELECTION_METRIC = "ndcg@100"
"""The validation metric that chooses the best epoch, as for CLLM4Rec."""


Loss = Callable[[IntArray, Ragged, np.random.Generator], Tensor]


class Network(nn.Module, abc.ABC):
    """Constructed as `Network(training, **params)`. `users` are user indices (-1: unknown); row i of `histories` belongs to
    `users[i]`."""

    pretrain_epochs = 0
    """Epochs with `pretrain_loss`, without validation, before the epochs with `loss`."""

    @abc.abstractmethod
    def loss(self, users: IntArray, histories: Ragged, random: np.random.Generator) -> Tensor:
        """The loss of a step: a mean over the users."""

    @abc.abstractmethod
    def logits(self, users: IntArray, histories: Ragged) -> Tensor:
        """Scores (B × J) from the complete histories."""

    def pretrain_loss(self, users: IntArray, histories: Ragged, random: np.random.Generator) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no pretraining")


class Neural:
    """A baseline that trains a Network with Adam and keeps the best epoch by SELECTION_METRIC. Training ends when patience
    or the budget runs out.

    `curve` holds the validation value of each epoch. Order, masks and dropout depend only on `TrainingData.seed`.
    """

    def __init__(
        self,
        network: type[Network],
        *,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.0,
        batch_users: int = 128,
        patience: int = 10,
        **params: Any,
    ) -> None:
        self._make, self._params, self.batch_users, self.patience = network, params, batch_users, patience
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def fit(self, training: TrainingData) -> Self:
        """Raises DataError if no user has a validation item, TrainingError if the loss is not finite."""
        if not len(training.validation.users):
            raise DataError("no user has a validation item to choose the best epoch; raise data.split.validation")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.network = self._make(training, **self._params)
            self._train(training)
        return self

    def scores(self, users: IntArray, histories: Ragged) -> npt.NDArray[np.float32]:
        self.network.eval()
        with torch.inference_mode():
            return np.asarray(self.network.logits(users, histories).float().numpy(), np.float32)

    def _train(self, training: TrainingData) -> None:
        network, budget, started = self.network, training.budget, time.monotonic()
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        random = np.random.default_rng(training.seed)
        for _ in range(network.pretrain_epochs):
            if time.monotonic() - started < budget.max_seconds / 2:
                self._epoch(training, optimizer, random, network.pretrain_loss)
        self.curve: list[float] = []
        best_epoch, best = 0, copy.deepcopy(network.state_dict())
        for epoch in range(budget.max_epochs):
            self._epoch(training, optimizer, random, network.loss)
            self.curve.append(self._validate(training))
            if epoch == 0 or self.curve[-1] > self.curve[best_epoch]:
                best_epoch, best = epoch, copy.deepcopy(network.state_dict())
            if epoch - best_epoch >= self.patience or time.monotonic() - started > budget.max_seconds:
                break
        network.load_state_dict(best)

    def _epoch(
        self, training: TrainingData, optimizer: torch.optim.Adam, random: np.random.Generator, loss_of: Loss
    ) -> None:
        self.network.train()
        users = random.permutation(np.flatnonzero(training.histories.lengths))
        for part in slices(len(users), self.batch_users):
            batch = users[part]
            loss = loss_of(batch, training.histories.take(batch), random)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss of {type(self.network).__name__} is {loss.item()}; lower its learning_rate"
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def _validate(self, training: TrainingData) -> float:
        validation, k = training.validation, depth([SELECTION_METRIC])
        ranked_BK = rank_with(self, validation.users, validation.read, validation.read, training.num_items, k)
        return means(validation.metrics(ranked_BK))[SELECTION_METRIC]


def multinomial_nll(logits_BJ: Tensor, targets: Ragged) -> Tensor:
    """-sum over a user's targets of log softmax over the whole catalog, mean over users (docs/method.md, Eq. 9)."""
    log_BJ = functional.log_softmax(logits_BJ, dim=-1)
    return -log_BJ[torch.from_numpy(targets.rows), torch.from_numpy(targets.values)].sum() / len(targets)


def hold_out(histories: Ragged, fraction: float, random: np.random.Generator) -> tuple[Ragged, Ragged]:
    """(kept, held out): a random `fraction` of each history is held out; at least one item, and never all of several items."""
    order = np.lexsort((random.random(len(histories.values)), histories.rows))
    place = np.empty(len(order), np.int64)
    place[order] = histories.places
    most = np.maximum(histories.lengths - 1, 1)
    num_held = np.clip(np.rint(fraction * histories.lengths), 1, most)
    is_held = place < num_held[histories.rows]
    return histories.where(~is_held), histories.where(is_held)


def bag(rows: sparse.csr_array, weight: Tensor) -> Tensor:
    """The product of sparse `rows` (B×W) and `weight` (W×H)."""
    index, offset = torch.from_numpy(rows.indices.astype(np.int64)), torch.from_numpy(rows.indptr.astype(np.int64))
    values = torch.from_numpy(rows.data.astype(np.float32))
    return functional.embedding_bag(index, weight, offset[:-1], mode="sum", per_sample_weights=values)


def bag_of_items(histories: Ragged, num_items: int) -> sparse.csr_array:
    """Histories as a sparse B × J matrix whose rows have length 1."""
    lengths = np.maximum(histories.lengths, 1)
    value = np.repeat(1 / np.sqrt(lengths), histories.lengths).astype(np.float32)
    return sparse.csr_array((value, histories.values, histories.offsets), shape=(len(histories), num_items))


def padded(histories: Ragged, length: int, filler: int) -> Tensor:
    """B × T item indices: the latest `length` items of each history, left-aligned and padded with `filler`."""
    place = histories.places - np.maximum(histories.lengths - length, 0)[histories.rows]
    recent = place >= 0
    width = max(1, min(length, int(histories.lengths.max(initial=0))))
    item_BT = np.full((len(histories), width), filler, np.int64)
    item_BT[histories.rows[recent], place[recent]] = histories.values[recent]
    return torch.from_numpy(item_BT)


def small_normal(*shape: int) -> nn.Parameter:
    """Embedding weights with the initialization common in transformers."""
    return nn.Parameter(0.02 * torch.randn(*shape))
