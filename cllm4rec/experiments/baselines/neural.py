"""The one training loop of all neural baselines. A baseline adds its network and its loss (`Network`), no more.

Shapes: B users, J items, T places of a history, W words.
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

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.errors import DataError, TrainingError
from cllm4rec.evaluation.baseline import Training
from cllm4rec.metrics.protocol import means, rank_with
from cllm4rec.metrics.ranking import depth
from cllm4rec.typing import IntArray

STOPPED_BY = "ndcg@100"
"""Of the validation split: what CLLM4Rec's epochs are chosen by as well."""


Loss = Callable[[IntArray, Ragged, np.random.Generator], Tensor]


class Network(nn.Module, abc.ABC):
    """Made by `Network(training, **params)`. `users` are user indices (-1: unknown), rows of `histories` go with them."""

    pretrain_epochs = 0
    """Epochs of `pretrain_loss` before those of `loss`, without validation."""

    @abc.abstractmethod
    def loss(self, users: IntArray, histories: Ragged, random: np.random.Generator) -> Tensor:
        """What a step makes smaller: a mean over the users."""

    @abc.abstractmethod
    def logits(self, users: IntArray, histories: Ragged) -> Tensor:
        """B × J, from the whole histories."""

    def pretrain_loss(self, users: IntArray, histories: Ragged, random: np.random.Generator) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no pretraining")


class Neural:
    """A baseline around a Network: Adam, the best epoch by STOPPED_BY kept, an end by patience or budget.

    `curve` holds the validation value of each epoch. Epochs, order, masks and dropout follow from the training's seed.
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

    def fit(self, training: Training) -> Self:
        """Raises DataError where no user has a validation item, TrainingError at a loss that is not finite."""
        if not len(training.validation.users):
            raise DataError("no user has a validation item to choose an epoch by; raise data.split.validation")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.network = self._make(training, **self._params)
            self._train(training)
        return self

    def scores(self, users: IntArray, histories: Ragged) -> npt.NDArray[np.float32]:
        self.network.eval()
        with torch.inference_mode():
            return np.asarray(self.network.logits(users, histories).float().numpy(), np.float32)

    def _train(self, training: Training) -> None:
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
        self, training: Training, optimizer: torch.optim.Adam, random: np.random.Generator, loss_of: Loss
    ) -> None:
        self.network.train()
        users = random.permutation(np.flatnonzero(training.histories.lengths))
        for start in range(0, len(users), self.batch_users):
            batch = users[start : start + self.batch_users]
            loss = loss_of(batch, training.histories.take(batch), random)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss of {type(self.network).__name__} is {loss.item()}; lower its learning_rate"
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def _validate(self, training: Training) -> float:
        asked = training.validation
        ranked_BK = rank_with(self, asked.users, asked.read, asked.read, training.num_items, depth([STOPPED_BY]))
        return means(asked.metrics(ranked_BK))[STOPPED_BY]


def multinomial_nll(logits_BJ: Tensor, targets: Ragged) -> Tensor:
    """-sum over a user's targets of log softmax over the whole catalog, mean over users (method.md, Eq. 9)."""
    log_BJ = functional.log_softmax(logits_BJ, dim=-1)
    return -log_BJ[torch.from_numpy(targets.rows), torch.from_numpy(targets.values)].sum() / len(targets)


def hold_out(histories: Ragged, fraction: float, random: np.random.Generator) -> tuple[Ragged, Ragged]:
    """(kept, held out): a random `fraction` of each history, at least one item and, where there are two, not all."""
    order = np.lexsort((random.random(len(histories.values)), histories.rows))
    place = np.empty(len(order), np.int64)
    place[order] = histories.places
    most = np.maximum(histories.lengths - 1, 1)
    num_held = np.clip(np.rint(fraction * histories.lengths), 1, most)
    is_held = place < num_held[histories.rows]
    return histories.where(~is_held), histories.where(is_held)


def bag(rows: sparse.csr_array, weight: Tensor) -> Tensor:
    """`rows` (B×W) times `weight` (W×H), without a dense B×W."""
    index, offset = torch.from_numpy(rows.indices.astype(np.int64)), torch.from_numpy(rows.indptr.astype(np.int64))
    values = torch.from_numpy(rows.data.astype(np.float32))
    return functional.embedding_bag(index, weight, offset[:-1], mode="sum", per_sample_weights=values)


def bag_of_items(histories: Ragged, num_items: int) -> sparse.csr_array:
    """B × J: histories as rows of length 1."""
    lengths = np.maximum(histories.lengths, 1)
    value = np.repeat(1 / np.sqrt(lengths), histories.lengths).astype(np.float32)
    return sparse.csr_array((value, histories.values, histories.offsets), shape=(len(histories), num_items))


def padded(histories: Ragged, length: int, filler: int) -> Tensor:
    """B × T item indices: the latest `length` items of each history from the left, then `filler`."""
    place = histories.places - np.maximum(histories.lengths - length, 0)[histories.rows]
    recent = place >= 0
    width = max(1, min(length, int(histories.lengths.max(initial=0))))
    item_BT = np.full((len(histories), width), filler, np.int64)
    item_BT[histories.rows[recent], place[recent]] = histories.values[recent]
    return torch.from_numpy(item_BT)


def small_normal(*shape: int) -> nn.Parameter:
    """Weights of an embedding, as transformers start them."""
    return nn.Parameter(0.02 * torch.randn(*shape))
