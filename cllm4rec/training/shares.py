"""Tensors that are divided over workers or files, so that none of them passes through one memory.

- `Share`: what one worker holds of a tensor
- `Parts`: the shares of all workers, as memory-mapped files

Worker r of W has elements [r · n, (r + 1) · n) of the flattened tensor, n = ⌈size / W⌉, as in ZeRO-3. Shares in the order of the
workers are therefore the tensor itself, and any range of it can be read at another number of workers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Share:
    """The share of one worker. values: flat, without padding. shape: of the whole tensor."""

    values: Tensor
    shape: torch.Size


@dataclasses.dataclass(frozen=True)
class Parts:
    """A tensor in consecutive flat parts. shape: of the whole tensor."""

    parts: list[Tensor]
    shape: torch.Size

    def between(self, begin: int, end: int) -> Tensor:
        """A copy of elements [begin, end) of the flattened tensor."""
        found, first = [], 0
        for part in self.parts:
            found.append(part[max(0, begin - first) : max(0, end - first)])
            first += len(part)
        return torch.cat(found)


Value = Tensor | Share | Parts


def whole(value: Value) -> Tensor:
    """All of a tensor. A share must be all there is."""
    if isinstance(value, Parts):
        return value.between(0, value.shape.numel()).view(value.shape)
    return value.values.view(value.shape) if isinstance(value, Share) else value


def bounds(size: int, rank: int, num_workers: int) -> tuple[int, int]:
    """The elements [begin, end) of a flattened tensor of `size` elements that worker `rank` has."""
    per_worker = -(-size // num_workers)
    return min(size, rank * per_worker), min(size, (rank + 1) * per_worker)


def share_of(value: Value, rank: int, num_workers: int) -> Share:
    """The share of a worker. A share is taken as it is."""
    if isinstance(value, Share):
        return value
    begin, end = bounds(value.shape.numel(), rank, num_workers)
    if isinstance(value, Parts):
        return Share(value.between(begin, end), value.shape)
    return Share(value.flatten()[begin:end].clone(), value.shape)


def save_shares(shares: Mapping[str, Share], path: Path) -> None:
    """Write shares to a local safetensors file, with their shapes in its header."""
    shapes = {name: list(share.shape) for name, share in shares.items()}
    values = {name: share.values.detach().cpu().contiguous() for name, share in shares.items()}
    save_file(values, path, {"shapes": json.dumps(shapes)})


def map_parts(paths: list[Path]) -> dict[str, Parts]:
    """The tensors of the files of all workers, in the order of the workers, memory-mapped."""
    parts: dict[str, list[Tensor]] = {}
    shapes: dict[str, Any] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            shapes |= json.loads(file.metadata()["shapes"])
            for name in file.keys():  # noqa: SIM118 - not a mapping
                parts.setdefault(name, []).append(file.get_tensor(name))
    return {name: Parts(found, torch.Size(shapes[name])) for name, found in parts.items()}


def join_parts(tensors: Mapping[str, Parts], path: Path) -> None:
    """Write tensors to one local safetensors file, part by part: no tensor is whole in memory."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.shape.numel() * _FLOAT32
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns tensors
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            for part in tensor.parts:
                assert part.dtype == torch.float32, "all that is trained is float32"
                part.numpy().tofile(file)


_FLOAT32 = 4
