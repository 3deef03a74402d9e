"""Named tensors as one safetensors file, written and read without a second copy in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cllm4rec.errors import ArtifactError
from cllm4rec.storage import files


def save_tensors(tensors: Mapping[str, Tensor], uri: str) -> None:
    fs, path = files.filesystem(uri)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if isinstance(fs, LocalFileSystem):
        fs.makedirs(fs._parent(path), exist_ok=True)
        save_file(contiguous, path)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_file(contiguous, f"{folder}/tensors")
        files.copy_file(f"{folder}/tensors", uri)


def map_tensors(uri: str) -> dict[str, Tensor]:
    """Memory-mapped tensors on the CPU. Copy what you keep: the file may change later.

    Raises ArtifactError if the file is missing or not a safetensors file.
    """
    fs, path = files.filesystem(uri)
    if not fs.exists(path):
        raise ArtifactError(f"{uri} is missing; run the stage that writes it")
    try:
        if isinstance(fs, LocalFileSystem):
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        with tempfile.TemporaryDirectory() as folder:
            files.copy_file(uri, f"{folder}/tensors")
            return map_tensors(f"{folder}/tensors")
    except SafetensorError:
        raise ArtifactError(f"{uri} is not a safetensors file; run the stage that writes it with --force") from None
