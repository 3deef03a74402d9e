"""Rows stepped when they are read against dense Adam over the whole tables."""

import numpy as np
import pytest
import torch

from cllm4rec.training.row_adam import EPS, RowAdam

NUM_ROWS, WIDTH, LEARNING_RATE = 12, 5, 1e-2
OWNED = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 11])
NEVER_READ = 11


def some_reads(num_steps: int) -> list[list[torch.Tensor]]:
    """For each step the rows of one or two micro batches, which may share some. Row 0 is read first and last."""
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


def stepped(reads, flushes=(), scale=1.0):
    """Row-wise and dense values after the same steps, and where they began. `scale`: the size of the gradients."""
    generator = torch.Generator().manual_seed(0)
    begin = {name: torch.randn(NUM_ROWS, WIDTH, generator=generator) for name in ("left", "right")}
    lazy = {name: table.clone() for name, table in begin.items()}
    dense = {name: table.clone().requires_grad_() for name, table in begin.items()}
    rows = RowAdam(lazy, OWNED, LEARNING_RATE)
    optimizer = torch.optim.Adam(dense.values(), lr=LEARNING_RATE)
    for number, micro_batches in enumerate(reads):
        for table in dense.values():
            table.grad = torch.zeros_like(table)
        for chosen in micro_batches:
            leaves = rows.read(chosen)
            for name, leaf in leaves.items():
                # A gradient that depends on the values, so that a row that was not brought up to date tells.
                noise = torch.randn(leaf.shape, generator=generator)
                (scale * 4.0 * (leaf.square() / 2 + noise * leaf).sum()).backward()
                dense[name].grad.index_add_(0, chosen, scale * (dense[name].detach()[chosen] + noise))
        rows.step(gradient_scale=4.0)
        optimizer.step()
        if number in flushes:
            rows.flush()
    rows.flush()
    return rows, lazy, {name: table.detach() for name, table in dense.items()}, begin, optimizer


def furthest(left, right) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.mark.parametrize("num_steps", [60, 400])
def test_rows_stepped_when_read_equal_dense_adam(num_steps):
    reads = some_reads(num_steps)
    _, lazy, dense, begin, _ = stepped(reads, flushes=(20, 21))
    assert furthest(lazy, dense) < 1e-5 * furthest(dense, begin)
    assert furthest(dense, begin) > 10 * LEARNING_RATE
    assert torch.equal(lazy["left"][NEVER_READ], begin["left"][NEVER_READ])


def test_a_row_goes_on_moving_after_its_only_gradient():
    reads = [[torch.tensor([0, 3])], *([[torch.tensor([3])]] * 30)]
    _, lazy, dense, begin, _ = stepped(reads)
    moved = (dense["left"][0] - begin["left"][0]).abs()
    assert (moved > 2.5 * LEARNING_RATE).all(), "one step moves it by the learning rate"
    assert torch.allclose(lazy["left"][0], dense["left"][0], atol=1e-5 * moved.min().item())


def test_gradients_nearly_as_small_as_eps_move_rows_as_dense_ones():
    """Eps stands in the sum at its mean over the missed steps."""
    _, lazy, dense, begin, _ = stepped(some_reads(60), scale=10 * EPS)
    assert furthest(lazy, dense) < 5e-3 * furthest(dense, begin)


def test_moments_equal_dense_ones_and_a_run_goes_on_from_them():
    reads = some_reads(60)
    rows, lazy, dense, _, optimizer = stepped(reads)
    whole = {}
    for name, parameter in zip(lazy, optimizer.param_groups[0]["params"], strict=True):
        whole[name] = {moment: optimizer.state[parameter][moment] for moment in ("exp_avg", "exp_avg_sq")}
        for moment, dense_IK in whole[name].items():
            difference = (rows.moments_VK[name][moment] - dense_IK[OWNED]).abs().max()
            assert difference < 1e-5 * dense_IK.abs().max(), moment
    on = {name: table.clone() for name, table in dense.items()}
    resumed = RowAdam(on, OWNED, LEARNING_RATE)
    resumed.load(whole, num_steps=len(reads))
    for each in (rows, resumed):
        sum(leaf.sum() for leaf in each.read(torch.tensor([0, 1])).values()).backward()
        each.step()
        each.step()
        each.flush()
    assert furthest(lazy, on) < 1e-5


def test_reading_a_row_that_is_not_owned_is_refused():
    rows = RowAdam({"left": torch.zeros(NUM_ROWS, WIDTH)}, OWNED, LEARNING_RATE)
    with pytest.raises(AssertionError, match="on the worker that owns its row"):
        rows.read(torch.tensor([3, 4]))
