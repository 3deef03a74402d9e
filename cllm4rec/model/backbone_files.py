"""The directory of a backbone: its weights, or a reference to a stock model.

reference.json     name and revision of a stock model, and the sha256 of its config and of each file of weights
*.safetensors, config.json      the weights of a model that this package built or trained, as `save_pretrained` writes them
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from cllm4rec.config import BackboneSize, ModelConfig
from cllm4rec.errors import ArtifactError
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.built_backbone import build_backbone
from cllm4rec.model.stock_backbone import check_vocabulary, pretrained_backbone
from cllm4rec.storage import artifacts, files, hub

_REFERENCE = "reference.json"


def new_backbone(config: ModelConfig, num_words: int, seed: int) -> Backbone:
    """The untrained backbone that `model.backbone` describes, in float32.

    Raises ConfigError if it cannot be loaded, or if its words do not fit a tokenizer of `num_words` tokens.
    """
    if isinstance(config.backbone, BackboneSize):
        return build_backbone(config.backbone, num_words, config.max_tokens, seed)
    backbone = pretrained_backbone(config.backbone, config.revision, config.max_tokens)
    check_vocabulary(config.backbone, len(backbone.word_embeddings), num_words)
    return backbone


def save_backbone(backbone: Backbone, directory: str) -> None:
    """Write the safetensors and the config of a backbone that this package built or trained."""
    with tempfile.TemporaryDirectory() as folder, _no_progress_bars():
        backbone.model.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            files.copy_file(str(file), files.join(directory, file.name))


def save_reference(config: ModelConfig, directory: str) -> None:
    """Write the name, the revision and the digests of the files of a stock model instead of its weights."""
    assert isinstance(config.backbone, str)
    digests = hub.weights_digests(config.backbone, config.revision)
    reference = {"name": config.backbone, "revision": config.revision, "sha256": digests}
    files.write_json(files.join(directory, _REFERENCE), reference)


def load_backbone(directory: str, max_tokens: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Backbone:
    """Load the backbone that `save_backbone` or `save_reference` wrote, in a precision and on a device.

    Raises ArtifactError if a file of a referenced backbone has changed.
    """
    if _REFERENCE in files.list_files(directory):
        name, revision = _verified_reference(directory)
        return pretrained_backbone(name, revision, max_tokens, dtype, device)
    with local_copy(directory) as folder, _no_progress_bars():
        return pretrained_backbone(folder, None, max_tokens, dtype, device)


def verify_backbone(directory: str) -> None:
    """Raise ArtifactError if a file of the backbone has changed since it was written. Holds no weights in memory."""
    artifacts.verify_files(directory, artifacts.read_manifest(directory, "backbone"))
    if _REFERENCE in files.list_files(directory):
        _verified_reference(directory)


def _verified_reference(directory: str) -> tuple[str, str | None]:
    """Name and revision of a referenced backbone."""
    reference = files.read_json(files.join(directory, _REFERENCE))
    name, revision, expected = reference["name"], reference["revision"], reference.get("sha256")
    if expected is None:
        raise ArtifactError(
            f"{directory} refers to the backbone {name!r} as an earlier version did; run the backbone stage with --force"
        )
    found = hub.weights_digests(name, revision)
    for file in sorted({*expected, *found}):
        if expected.get(file) != found.get(file):
            raise ArtifactError(
                f"the backbone {name!r} is not the one these tables were trained with (the digest of {file} differs); "
                "restore the former one or train again"
            )
    return name, revision


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar per file, even for a model that loads in a millisecond."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


class local_copy:  # noqa: N801 - reads as a verb in a with statement
    """A local copy of a directory, removed at the end of the block. A local directory is used as it is."""

    def __init__(self, directory: str) -> None:
        self._fs, self._path = files.filesystem(directory)
        self._temporary: str | None = None

    def __enter__(self) -> str:
        if "file" in self._fs.protocol:
            return self._path
        self._temporary = tempfile.mkdtemp()
        self._fs.get(self._path.rstrip("/") + "/", self._temporary, recursive=True)
        return self._temporary

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            shutil.rmtree(self._temporary)
