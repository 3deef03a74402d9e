"""The directory of a backbone: its weights, or a reference to a stock model.

- `reference.json`: name and revision of a stock model, and the sha256 of its config and of each file of weights
- `*.safetensors`, `config.json`: the weights of a model that this package built or trained, as `save_pretrained` writes them, or
  a copy of those of a stock model
- `adapter.json`: settings of a LoRA adapter, and the sha256 of the files of weights that it belongs to
- `adapter.safetensors`: its matrices, once they are trained
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cllm4rec.config import Adapter, BackboneSize, Config, ModelConfig
from cllm4rec.errors import ArtifactError
from cllm4rec.model.adapter import add_adapter, load_adapter_weights, merge_adapter
from cllm4rec.model.backbone import Backbone, wrap
from cllm4rec.model.built_backbone import build_backbone
from cllm4rec.model.stock_backbone import (
    check_vocabulary,
    empty_model,
    pretrained_backbone,
    quiet_transformers,
    stock_config,
)
from cllm4rec.storage import artifacts, files, hub
from cllm4rec.storage.tensors import map_tensors, save_tensors

_REFERENCE = "reference.json"
_ADAPTER = "adapter.json"
_ADAPTER_WEIGHTS = "adapter.safetensors"
_MAX_SHARD = "2GB"


def new_backbone(config: ModelConfig, num_words: int, seed: int, dtype: torch.dtype | None = torch.float32) -> Backbone:
    """The untrained backbone that `model.backbone` describes.

    dtype: of a stock model, as in `pretrained_backbone`. Others are float32.
    Raises ConfigError if it cannot be loaded, or if its words do not fit a tokenizer of `num_words` tokens.
    """
    if isinstance(config.backbone, BackboneSize):
        return build_backbone(config.backbone, num_words, config.max_tokens, seed)
    backbone = pretrained_backbone(config.backbone, config.revision, config.max_tokens, dtype)
    check_vocabulary(config.backbone, len(backbone.word_embeddings), num_words)
    return backbone


def empty_backbone(config: ModelConfig, num_words: int) -> Backbone:
    """The backbone that `model.backbone` describes without memory for its weights, on torch's meta device."""
    with torch.device("meta"):
        if isinstance(config.backbone, BackboneSize):
            return build_backbone(config.backbone, num_words, config.max_tokens, 0)
        return wrap(empty_model(stock_config(config.backbone, config.revision)), config.max_tokens)


def save_backbone(backbone: Backbone, directory: str) -> None:
    """Write the safetensors and the config of a backbone that this package built or trained."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        backbone.model.save_pretrained(folder, max_shard_size=_MAX_SHARD)  # a shard is copied in memory
        for file in sorted(Path(folder).iterdir()):
            files.copy_file(str(file), files.join(directory, file.name))


def save_reference(config: ModelConfig, directory: str) -> None:
    """Write the name (or absolute folder), the commit and the digests of the files of a stock model instead of its weights."""
    assert isinstance(config.backbone, str)
    name, revision = hub.resolved(config.backbone, config.revision)
    reference = {"name": name, "revision": revision, "sha256": hub.weights_digests(name, revision)}
    files.write_json(files.join(directory, _REFERENCE), reference)


def save_copy(config: ModelConfig, directory: str) -> None:
    """Write a copy of the config and the weights of a stock model, file by file."""
    assert isinstance(config.backbone, str)
    folder = hub.weights_folder(config.backbone, config.revision)
    for name in hub.weights_digests(folder, None):
        files.copy_file(str(Path(folder) / name), files.join(directory, name))
    index = Path(folder) / hub.INDEX
    if index.exists():
        files.copy_file(str(index), files.join(directory, index.name))


def save_trained(config: Config, num_words: int, trained: Mapping[str, Tensor], directory: str) -> None:
    """Write the backbone of a config as its training on texts leaves it: stock weights are stored as `model.store_backbone` says.

    num_words: of the tokenizer. trained: the trained weights, or the matrices of the adapter, by name; empty for none.
    """
    model, adapter = config.model, config.backbone.adapter
    if isinstance(model.backbone, str) and (adapter or not trained):
        save = save_copy if model.store_backbone == "copy" else save_reference
        save(model, directory)
    else:
        backbone = new_backbone(model, num_words, config.seed, dtype=None)
        # strict=False: tied heads, buffers and matrices of an adapter are not among the parameters. assign=True: both sides may
        # be memory-mapped.
        backbone.load_state_dict(dict(trained), strict=False, assign=True)
        backbone.model.tie_weights()
        backbone.model.float()  # buffers
        save_backbone(backbone, directory)
    if adapter:
        save_adapter(adapter, config.seed, trained, directory)


def save_adapter(adapter: Adapter, seed: int, weights: Mapping[str, Tensor], directory: str) -> None:
    """Write an adapter beside the weights or the reference in a directory. weights: empty for one that is not trained yet."""
    settings = adapter.model_dump(include={"rank", "alpha", "targets"}) | {
        "seed": seed,
        "base": _base_digests(directory),
    }
    files.write_json(files.join(directory, _ADAPTER), settings)
    save_adapter_weights(weights, directory)


def save_adapter_weights(weights: Mapping[str, Tensor], directory: str) -> None:
    """Write the matrices of the adapter of a directory, which may have others already."""
    if weights:
        save_tensors(weights, files.join(directory, _ADAPTER_WEIGHTS))


def load_backbone(
    directory: str,
    max_tokens: int,
    dtype: torch.dtype | None = torch.float32,
    device: str = "cpu",
    merge: bool = True,
) -> Backbone:
    """Load the backbone of a directory, in a precision (None: that of its files) and on a device.

    merge: add an adapter to float32 weights, which is faster. Otherwise it stays beside them and can be trained. It always stays
        beside bfloat16 weights: a sum would be rounded to them, and a small change of a weight would be lost.
    Raises ArtifactError if a file of a referenced backbone has changed, or if the adapter belongs to another one.
    """
    backbone = _load_base(directory, max_tokens, dtype, device)
    if has_adapter(directory):
        _load_adapter(backbone, directory)
        if merge and backbone.dtype == torch.float32:
            merge_adapter(backbone)
        if merge:
            backbone.requires_grad_(False)
    return backbone


def has_adapter(directory: str) -> bool:
    """Whether a directory holds an adapter, trained or not."""
    return _ADAPTER in files.list_files(directory)


def _load_adapter(backbone: Backbone, directory: str) -> None:
    settings = files.read_json(files.join(directory, _ADAPTER))
    if settings.pop("base") != _base_digests(directory):
        raise ArtifactError(
            f"the adapter in {directory} was trained for other weights than those beside it; copy the whole directory again "
            "or train again"
        )
    seed = settings.pop("seed")
    add_adapter(backbone, Adapter(**settings), seed)
    if _ADAPTER_WEIGHTS not in files.list_files(directory):
        return
    try:
        load_adapter_weights(backbone, map_tensors(files.join(directory, _ADAPTER_WEIGHTS)))
    except (KeyError, RuntimeError) as error:
        raise ArtifactError(
            f"the adapter in {directory} does not fit its adapter.json ({error}); train again"
        ) from None


def _base_digests(directory: str) -> dict[str, str]:
    """The sha256 of the files of weights of a directory, or of the model that it refers to."""
    names = files.list_files(directory)
    if _REFERENCE in names:
        digests: dict[str, str] = files.read_json(files.join(directory, _REFERENCE)).get("sha256", {})
        return digests
    weights = [name for name in names if name.endswith(".safetensors") and name != _ADAPTER_WEIGHTS]
    return {name: files.digest_of_file(files.join(directory, name)) for name in weights}


def _load_base(directory: str, max_tokens: int, dtype: torch.dtype | None, device: str) -> Backbone:
    if _REFERENCE in files.list_files(directory):
        name, revision = _verified_reference(directory)
        return pretrained_backbone(name, revision, max_tokens, dtype, device)
    with local_copy(directory) as folder:
        return pretrained_backbone(folder, None, max_tokens, dtype, device)


def verify_backbone(directory: str) -> None:
    """Raise ArtifactError if a file of `backbone/` has changed since it was written. Holds no weights in memory."""
    artifacts.verify_files(directory, artifacts.read_manifest(directory, "backbone"))
    if _REFERENCE in files.list_files(directory):
        _verified_reference(directory)


def check_same_base(used: str, written: str) -> None:
    """Raise ArtifactError if the copy of a backbone in a model directory has other weights than `backbone/`.

    Its adapter may differ: it may be trained further.
    """
    if used != written and _base_digests(used) != _base_digests(written):
        raise ArtifactError(
            f"the frozen backbone in {used} is not that of {written}; run the pretrain stage with --force"
        )


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
