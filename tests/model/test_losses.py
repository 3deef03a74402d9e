import pytest
import torch

from cllm4rec.model import losses
from cllm4rec.model.losses import squared_distance, tied_cross_entropy


def reference_loss(hidden, table, rows, targets):
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
def test_loss_and_gradients_equal_a_reference_for_any_chunk_size(world, rows_at_once, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_BYTES", rows_at_once * 11 * 4)
    hidden, table, rows, targets = world
    loss = 3.0 * tied_cross_entropy(hidden.float(), table.float(), rows, targets)
    expected = 3.0 * reference_loss(hidden, table, rows, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(loss, (hidden, table))
    wanted = torch.autograd.grad(expected, (hidden, table))
    for gradient, expected_gradient in zip(found, wanted, strict=True):
        assert torch.allclose(gradient, expected_gradient, atol=1e-5)


def test_a_bias_is_added_to_all_logits_except_those_of_the_own_targets(world):
    """The bias is -log of the sampling probability. Targets not sampled have -inf: no other prediction counts them."""
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
    for gradient, expected_gradient in zip(found, wanted, strict=True):
        assert torch.allclose(gradient, expected_gradient, atol=1e-5)


def test_a_frozen_table_gets_no_gradient(world):
    hidden, table, rows, targets = world
    frozen = table.detach().float()
    tied_cross_entropy(hidden.float(), frozen, rows, targets).backward()
    assert frozen.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_target_of_probability_zero_has_a_finite_loss_and_an_exact_gradient(precision):
    hidden, table = torch.tensor([[20.0]], requires_grad=True), torch.tensor([[20.0], [-20.0]])
    loss = tied_cross_entropy(hidden, table, torch.tensor([0]), torch.tensor([1]), precision)
    loss.backward()
    assert loss.item() == pytest.approx(
        87.3, abs=0.1
    )  # the true loss is 800; 87.3 is -log of the smallest normal float32
    assert hidden.grad.item() == pytest.approx(40.0)


def test_a_loss_without_predictions_is_zero():
    empty = torch.empty(0, dtype=torch.long)
    table = torch.randn(3, 4, requires_grad=True)
    loss = tied_cross_entropy(torch.empty(0, 4), table, empty, empty)
    loss.backward()
    assert loss.item() == 0.0
    assert (table.grad == 0).all()


def test_squared_distance_weights_rows_by_their_counts():
    left, right = torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    assert squared_distance(left, right, torch.tensor([3, 2])).item() == 3 * 2 + 2 * 4


def test_with_products_in_bf16_the_loss_and_the_table_gradient_are_float32(world):
    hidden, table, rows, targets = world
    hidden, table = (tensor.detach().float().requires_grad_() for tensor in (hidden, table))
    rough = tied_cross_entropy(hidden, table, rows, targets, torch.bfloat16)
    exact = tied_cross_entropy(hidden, table, rows, targets)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=1e-2)
    assert rough.item() != exact.item()
    found = torch.autograd.grad(rough, (hidden, table))
    wanted = torch.autograd.grad(exact, (hidden, table))
    for gradient, expected_gradient in zip(found, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.allclose(gradient, expected_gradient, atol=0.03)
