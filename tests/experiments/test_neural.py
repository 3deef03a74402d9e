"""Code shared by the neural baselines: training loop, held-out items, bags and padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.world import parity_world
from cllm4rec.errors import DataError, TrainingError
from cllm4rec.evaluation.baseline import Budget, TrainingData
from cllm4rec.experiments.baselines.neural import Network, Neural, bag, bag_of_items, hold_out, multinomial_nll, padded
from cllm4rec.metrics.protocol import Validation

HISTORIES = Ragged.from_lists([[5, 3, 1], [2], [], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])


def training_with(histories: Histories, budget: Budget) -> TrainingData:
    return TrainingData(20, histories.train, Validation(histories), [""] * 20, [""] * len(histories.user), 0, budget)


class Scripted(Network):
    """Ranks each user's validation items first in the epochs `good`, last in all others; `steps` records what was run."""

    def __init__(
        self, training: TrainingData, good: tuple[int, ...] = (), pretrain: int = 0, loss: float = 1.0
    ) -> None:
        super().__init__()
        self.good, self.pretrain_epochs, self.value = good, pretrain, loss
        self.relevant = training.validation.relevant
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("epoch", torch.tensor(-1))
        self.steps: list[tuple[str, list[int]]] = []

    def pretrain_loss(self, users: Any, histories: Ragged, random: np.random.Generator) -> Tensor:
        self.steps.append(("pretrain", users.tolist()))
        return self.weight * self.value

    def loss(self, users: Any, histories: Ragged, random: np.random.Generator) -> Tensor:
        self.steps.append(("train", users.tolist()))
        self.epoch += 1  # all users in one batch: a step is an epoch
        return self.weight * self.value

    def logits(self, users: Any, histories: Ragged) -> Tensor:
        score_BJ = torch.zeros(len(users), 20)
        items = self.relevant.take(users)
        score_BJ[items.rows, items.values] = 1.0 if int(self.epoch) in self.good else -1.0
        return score_BJ


def fit(max_epochs: int = 50, max_seconds: float = 60.0, patience: int = 10, **script: Any) -> Any:
    training = training_with(parity_world().histories, Budget(max_epochs, max_seconds))
    return Neural(Scripted, patience=patience, **script).fit(training)


def test_the_best_epoch_is_kept_and_patience_ends_the_run() -> None:
    fitted = fit(good=(3, 5), patience=4)
    assert int(fitted.network.epoch) == 3, "a later epoch with an equal value is not better"
    assert len(fitted.curve) == 3 + 4 + 1
    assert fitted.curve[3] == fitted.curve[5] == 1.0


def test_a_run_ends_at_the_budgets_epochs_or_seconds() -> None:
    assert len(fit(max_epochs=7).curve) == 7
    assert len(fit(max_seconds=0.0).curve) == 1, "one epoch is always run"


def test_pretraining_comes_first_and_counts_no_epoch() -> None:
    fitted = fit(max_epochs=2, pretrain=3)
    assert [kind for kind, _ in fitted.network.steps] == ["pretrain"] * 3 + ["train"] * 2


def test_pretraining_leaves_half_of_the_seconds() -> None:
    assert [kind for kind, _ in fit(max_seconds=0.0, pretrain=3).network.steps] == ["train"]


def test_every_user_is_trained_on_once_an_epoch_in_another_order() -> None:
    first, second = (users for _, users in fit(max_epochs=2).network.steps)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second


def test_a_batch_holds_no_more_users_than_it_may() -> None:
    steps = fit(max_epochs=1, batch_users=16).network.steps
    assert [len(users) for _, users in steps] == [16, 16, 8]


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(TrainingError, match="the loss of Scripted is nan; lower its learning_rate"):
        fit(loss=float("nan"))


def test_training_without_validation_items_is_refused() -> None:
    world = parity_world().histories
    nothing = Histories(world.user, world.train, Ragged.from_lists([[]] * 40), world.test)
    with pytest.raises(DataError, match="no user has a validation item"):
        Neural(Scripted).fit(training_with(nothing, Budget()))


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 1.0])
def test_the_held_out_part_leaves_something_to_read(fraction: float) -> None:
    kept, held = hold_out(HISTORIES, fraction, np.random.default_rng(0))
    together = [sorted(left + right) for left, right in zip(kept.tolist(), held.tolist(), strict=True)]
    assert together == [sorted(row) for row in HISTORIES.tolist()]
    assert held.lengths.tolist() == [{0.5: 2, 1.0: 2}.get(fraction, 1), 1, 0, {0.2: 2, 0.5: 5, 1.0: 9}.get(fraction, 1)]
    assert kept[3].tolist() == sorted(kept[3].tolist()), "what is kept stays in order of time"


def test_each_item_is_held_out_as_often_as_another() -> None:
    random = np.random.default_rng(0)
    held = np.concatenate([hold_out(HISTORIES, 0.2, random)[1][3] for _ in range(1000)])
    assert np.bincount(held, minlength=10) == pytest.approx(np.full(10, 200), abs=50)


def test_padding_keeps_the_latest_items_from_the_left() -> None:
    assert padded(HISTORIES, 4, -7).tolist() == [[5, 3, 1, -7], [2, -7, -7, -7], [-7] * 4, [6, 7, 8, 9]]
    assert padded(HISTORIES.take(np.array([2])), 4, -7).tolist() == [[-7]]


def test_a_bag_is_a_product_with_a_sparse_matrix() -> None:
    weight = torch.randn(10, 3)
    rows = bag_of_items(HISTORIES, 10)
    np.testing.assert_allclose(bag(rows, weight).numpy(), rows.toarray() @ weight.numpy(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows.toarray(), axis=1), [1, 1, 0, 1], atol=1e-6)


def test_the_likelihood_is_summed_over_targets_and_averaged_over_users() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    log_probability = torch.log_softmax(logits, dim=1)
    expected = -(log_probability[0, 1] + log_probability[0, 2] + log_probability[1, 0]) / 2
    assert multinomial_nll(logits, Ragged.from_lists([[1, 2], [0]])).item() == pytest.approx(expected.item())
