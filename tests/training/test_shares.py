"""Checkpoints whose tensors are divided over files, written by some workers and read by another number of them."""

import pytest
import torch
from safetensors.torch import load_file

from cllm4rec.errors import ArtifactError
from cllm4rec.training.checkpoints import Checkpoint, Progress, read_checkpoint, write_checkpoint
from cllm4rec.training.shares import join_parts, share_of, whole

TENSORS = {"table": torch.arange(35.0).view(7, 5), "bias": torch.arange(2.0), "step": torch.tensor(4.0)}


def write(folder, num_workers):
    for rank in range(num_workers):
        shares = {name: share_of(tensor, rank, num_workers) for name, tensor in TENSORS.items()}
        write_checkpoint(folder, Checkpoint(Progress(1, 2), shares, shares), "run", rank, num_workers)
    return folder


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
def test_shares_are_read_at_any_number_of_workers(tmp_path, num_workers):
    read = read_checkpoint(write(tmp_path, 3), "run")
    assert read.progress == Progress(1, 2)
    for name, tensor in TENSORS.items():
        assert torch.equal(whole(read.state[name]), tensor)
        shares = [share_of(read.best[name], rank, num_workers) for rank in range(num_workers)]
        assert torch.equal(torch.cat([share.values for share in shares]).view(tensor.shape), tensor)
        assert max(len(share.values) for share in shares) == -(-tensor.numel() // num_workers)


def test_a_checkpoint_without_the_shares_of_one_worker_or_with_damaged_ones_is_refused(tmp_path):
    write(tmp_path, 3)
    with pytest.raises(ArtifactError, match="another config"):
        read_checkpoint(tmp_path, "another run")
    file = tmp_path / "best-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"the sha256 of best-00001-of-00003\.safetensors differs"):
        read_checkpoint(tmp_path, "run")
    for name in ("best", "state", "progress", "checkpoint"):
        next(tmp_path.glob(f"{name}-00001-*")).unlink()
    with pytest.raises(ArtifactError, match="is incomplete"):
        read_checkpoint(tmp_path, "run")


def test_joined_shares_are_one_safetensors_file(tmp_path):
    best = read_checkpoint(write(tmp_path, 3), "run").best
    join_parts(best, tmp_path / "joined.safetensors")
    joined = load_file(tmp_path / "joined.safetensors")
    assert joined.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(joined[name], tensor)
