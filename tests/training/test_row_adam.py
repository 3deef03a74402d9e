"""Row-wise Adam compared with dense Adam over whole tables."""

import numpy as np
import pytest
import torch

from cllm4rec.training.row_adam import EPS, RowAdam

NUM_ROWS, WIDTH, LEARNING_RATE = 12, 5, 1e-2
OWNED = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 11])
NEVER_READ = 11


def random_reads(num_steps: int) -> list[list[torch.Tensor]]:
    """The rows of one or two micro-batches per step, which may overlap. Row 0 is read in the first and the last step."""
    generator = np.random.default_rng(0)
    readable = OWNED[1:-1].numpy()
    reads = [
        [
            torch.from_numpy(np.sort(generator.choice(readable, generator.integers(0, 4), replace=False)))
            for _ in range(1 + step % 2)
        ]
        for step in range(num_steps)
    ]
    reads[0][0] = reads[-1][0] = torch.tensor([0, 3])
    return reads


def train_both(reads, flushes=(), scale=1.0):
    """Row-wise and dense values after the same steps, and the initial values. scale: of the gradients."""
    generator = torch.Generator().manual_seed(0)
    initial = {name: torch.randn(NUM_ROWS, WIDTH, generator=generator) for name in ("left", "right")}
    lazy = {name: table.clone() for name, table in initial.items()}
    dense = {name: table.clone().requires_grad_() for name, table in initial.items()}
    rows = RowAdam(lazy, OWNED, LEARNING_RATE)
    optimizer = torch.optim.Adam(dense.values(), lr=LEARNING_RATE)
    for number, micro_batches in enumerate(reads):
        for table in dense.values():
            table.grad = torch.zeros_like(table)
        for row_numbers in micro_batches:
            leaves = rows.read(row_numbers)
            for name, leaf in leaves.items():
                # The gradient depends on the values, so that an outdated row changes the result.
                noise = torch.randn(leaf.shape, generator=generator)
                (scale * 4.0 * (leaf.square() / 2 + noise * leaf).sum()).backward()
                dense[name].grad.index_add_(0, row_numbers, scale * (dense[name].detach()[row_numbers] + noise))
        rows.step(gradient_scale=4.0)
        optimizer.step()
        if number in flushes:
            rows.flush()
    rows.flush()
    return rows, lazy, {name: table.detach() for name, table in dense.items()}, initial, optimizer


def max_difference(left, right) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.mark.parametrize("num_steps", [60, 400])
def test_rows_stepped_when_read_equal_dense_adam(num_steps):
    reads = random_reads(num_steps)
    _, lazy, dense, initial, _ = train_both(reads, flushes=(20, 21))
    assert max_difference(lazy, dense) < 1e-5 * max_difference(dense, initial)
    assert max_difference(dense, initial) > 10 * LEARNING_RATE
    assert torch.equal(lazy["left"][NEVER_READ], initial["left"][NEVER_READ])


def test_a_row_continues_to_move_after_its_only_gradient():
    reads = [[torch.tensor([0, 3])], *([[torch.tensor([3])]] * 30)]
    _, lazy, dense, initial, _ = train_both(reads)
    moved = (dense["left"][0] - initial["left"][0]).abs()
    assert (moved > 2.5 * LEARNING_RATE).all(), "one step moves a row by the learning rate"
    assert torch.allclose(lazy["left"][0], dense["left"][0], atol=1e-5 * moved.min().item())


def test_gradients_near_eps_move_rows_as_dense_adam_does():
    """The sum over missed steps uses the mean of eps."""
    _, lazy, dense, initial, _ = train_both(random_reads(60), scale=10 * EPS)
    assert max_difference(lazy, dense) < 5e-3 * max_difference(dense, initial)


def test_moments_equal_those_of_dense_adam_and_can_be_loaded():
    reads = random_reads(60)
    rows, lazy, dense, _, optimizer = train_both(reads)
    moments_IK = {}
    for name, parameter in zip(lazy, optimizer.param_groups[0]["params"], strict=True):
        moments_IK[name] = {moment: optimizer.state[parameter][moment] for moment in ("exp_avg", "exp_avg_sq")}
        for moment, dense_IK in moments_IK[name].items():
            difference = (rows.moments_VK[name][moment] - dense_IK[OWNED]).abs().max()
            assert difference < 1e-5 * dense_IK.abs().max(), moment
    resumed_tables = {name: table.clone() for name, table in dense.items()}
    resumed = RowAdam(resumed_tables, OWNED, LEARNING_RATE)
    resumed.load(moments_IK, num_steps=len(reads))
    for optimizer in (rows, resumed):
        sum(leaf.sum() for leaf in optimizer.read(torch.tensor([0, 1])).values()).backward()
        optimizer.step()
        optimizer.step()
        optimizer.flush()
    assert max_difference(lazy, resumed_tables) < 1e-5


def test_reading_a_row_that_is_not_owned_is_an_error():
    rows = RowAdam({"left": torch.zeros(NUM_ROWS, WIDTH)}, OWNED, LEARNING_RATE)
    with pytest.raises(AssertionError, match="on the worker that owns its row"):
        rows.read(torch.tensor([3, 4]))
