import pytest
import torch

from cllm4rec.model import losses
from cllm4rec.model.losses import squared_distance, tied_cross_entropy


def obvious(hidden, table, rows, targets):
    log_p = torch.log_softmax(hidden @ table.T, dim=1)
    return -sum(log_p[row, target] for row, target in zip(rows.tolist(), targets.tolist(), strict=True))


@pytest.fixture
def world():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    table = torch.randn(11, 5, generator=generator, dtype=torch.float64).requires_grad_()
    rows = torch.tensor([0, 0, 0, 2, 3, 3, 6])  # some predictions have many targets, some none
    targets = torch.tensor([1, 4, 10, 0, 2, 2, 5])
    return hidden, table, rows, targets


@pytest.mark.parametrize("rows_at_once", [1000, 2, 1, 0])
def test_loss_and_gradients_equal_the_obvious_ones_whatever_the_chunk(world, rows_at_once, monkeypatch):
    monkeypatch.setattr(losses, "_LOGITS_BYTES", rows_at_once * 11 * 4)
    hidden, table, rows, targets = world
    loss = 3.0 * tied_cross_entropy(hidden.float(), table.float(), rows, targets)
    expected = 3.0 * obvious(hidden, table, rows, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(loss, (hidden, table))
    wanted = torch.autograd.grad(expected, (hidden, table))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_bias_counts_everywhere_but_at_a_predictions_own_targets(world):
    """Of items that were drawn the bias is -log of their chance; a target that was not drawn is nobody else's."""
    hidden, table, rows, targets = world
    bias = torch.linspace(0.0, 3.0, 11, dtype=torch.float64)
    bias[4] = bias[10] = -torch.inf
    logits = hidden @ table.T
    is_own = torch.zeros(7, 11, dtype=torch.bool)
    is_own[rows, targets] = True
    log_p = torch.log_softmax(torch.where(is_own, logits, logits + bias), dim=1)
    expected = -log_p[rows, targets].sum()
    loss = tied_cross_entropy(hidden.float(), table.float(), rows, targets, bias_J=bias.float())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(loss, (hidden, table))
    wanted = torch.autograd.grad(expected, (hidden, table))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_frozen_table_gets_no_gradient(world):
    hidden, table, rows, targets = world
    frozen = table.detach().float()
    tied_cross_entropy(hidden.float(), frozen, rows, targets).backward()
    assert frozen.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_target_of_no_probability_loses_a_finite_amount_and_keeps_its_gradient(precision):
    hidden, table = torch.tensor([[20.0]], requires_grad=True), torch.tensor([[20.0], [-20.0]])
    loss = tied_cross_entropy(hidden, table, torch.tensor([0]), torch.tensor([1]), precision)
    loss.backward()
    assert loss.item() == pytest.approx(87.3, abs=0.1)  # of 800: what the smallest normal float32 stands for
    assert hidden.grad.item() == pytest.approx(40.0)


def test_no_predictions_lose_nothing():
    empty = torch.empty(0, dtype=torch.long)
    table = torch.randn(3, 4, requires_grad=True)
    loss = tied_cross_entropy(torch.empty(0, 4), table, empty, empty)
    loss.backward()
    assert loss.item() == 0.0
    assert (table.grad == 0).all()


def test_squared_distance_weighs_rows_by_their_times():
    left, right = torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    assert squared_distance(left, right, torch.tensor([3, 2])).item() == 3 * 2 + 2 * 4


def test_products_in_bf16_still_sum_and_collect_the_tables_gradient_in_float32(world):
    hidden, table, rows, targets = world
    hidden, table = (tensor.detach().float().requires_grad_() for tensor in (hidden, table))
    rough = tied_cross_entropy(hidden, table, rows, targets, torch.bfloat16)
    exact = tied_cross_entropy(hidden, table, rows, targets)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=1e-2)
    assert rough.item() != exact.item()
    found = torch.autograd.grad(rough, (hidden, table))
    wanted = torch.autograd.grad(exact, (hidden, table))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one, other, atol=0.03)
