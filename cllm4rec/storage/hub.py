"""The files of a pretrained model: a folder, the cache of this machine, or a hub.

    folder = config_folder(name, revision)         a local folder with config.json (and the tokenizer)
    folder = weights_folder(name, revision)        the same with all safetensors
    digests = weights_digests(name, revision)      sha256 by file, without downloading weights

A folder is used as it is. A name is looked up in the cache first, so a machine with a filled cache never waits for the
network. Model code in a repository is never run.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

from cllm4rec.errors import ConfigError
from cllm4rec.storage.files import digest_of_file

TIMEOUT_S = 10.0
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHTS = "*.safetensors"
INDEX = "model.safetensors.index.json"
_OTHER_FILES = ("*/*", "consolidated*")
"""Copies of the weights for other programs, which some repositories hold beside those for transformers."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def tokenizer_folder(name: str, revision: str | None) -> str:
    """A local folder with the tokenizer of a model. Raises ConfigError if the model cannot be found."""
    return _folder(name, revision, with_weights=False)


def config_folder(name: str, revision: str | None) -> str:
    """A local folder with the config of a model. Raises ConfigError if it cannot be had."""
    folder = tokenizer_folder(name, revision)
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise ConfigError(f"the backbone {name!r} has no config.json; set model.backbone to the folder of a model")
    return folder


def weights_folder(name: str, revision: str | None) -> str:
    """A local folder with the config and all weights of a model. Raises ConfigError if they cannot be had."""
    return _folder(name, revision, with_weights=True)


def local_weights_folder(name: str, revision: str | None) -> str | None:
    """A folder with all weights of a model that this machine has, or None if they would have to be downloaded.

    Raises ConfigError if a folder lacks some.
    """
    return weights_folder(name, revision) if os.path.isdir(name) else _cached(name, revision, with_weights=True)


def weights_digests(name: str, revision: str | None) -> dict[str, str]:
    """The sha256 of config.json and of each file of weights, by name.

    Of a model that only a hub has, the hub states them.
    Raises ConfigError if the model cannot be found, has no safetensors, or is damaged in the cache.
    """
    folder = local_weights_folder(name, revision)
    if folder is not None:
        names = ["config.json", *_weight_files(name, folder)]
        return {file: _digest(name, os.path.join(folder, file)) for file in names}
    small = config_folder(name, revision)
    try:
        siblings: Any = _hub().model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT_S).siblings
    except Exception as error:
        raise ConfigError(_sentence(name, error)) from None
    stated = {file.rfilename: file.lfs.sha256 for file in siblings if file.lfs}
    names = ["model.safetensors"]
    if names[0] not in stated and os.path.exists(os.path.join(small, INDEX)):
        names = _shards(name, small)
    if not set(names) <= stated.keys():
        raise ConfigError(_no_safetensors(name))
    weights = {file: stated[file] for file in names}
    return {"config.json": _digest(name, os.path.join(small, "config.json")), **weights}


def resolved(name: str, revision: str | None) -> tuple[str, str | None]:
    """The absolute path of a folder and None, or the name on a hub and the commit that a revision stands for now.

    Raises ConfigError if the model cannot be found.
    """
    if os.path.isdir(name):
        return os.path.abspath(name), None
    return name, os.path.basename(config_folder(name, revision))


def _folder(name: str, revision: str | None, with_weights: bool) -> str:
    if os.path.isdir(name):
        if with_weights:
            _weight_files(name, name)
        return name
    if name.startswith(("/", ".", "~")):
        raise ConfigError(f"the folder {name} does not exist; correct model.backbone")
    cached = _cached(name, revision, with_weights)
    if cached is not None:
        return cached
    from huggingface_hub import snapshot_download

    try:
        # Asked first, because a download would retry for a minute before it gives up.
        _hub().model_info(name, revision=revision, timeout=TIMEOUT_S)
        folder: str = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*_SMALL_FILES, *([_WEIGHTS] if with_weights else [])],
            ignore_patterns=list(_OTHER_FILES),
        )
    except Exception as error:  # the types of errors depend on the HTTP library of the client
        raise ConfigError(_sentence(name, error)) from None
    if with_weights:
        _weight_files(name, folder)
    return folder


def _cached(name: str, revision: str | None, with_weights: bool) -> str | None:
    """The folder of a model in the cache, or None if a file is missing there."""
    from huggingface_hub import snapshot_download

    try:
        folder: str = snapshot_download(name, revision=revision, local_files_only=True)
    except Exception:
        return None
    if not os.path.exists(os.path.join(folder, "config.json")):
        return None
    if with_weights:
        try:
            _weight_files(name, folder)
        except ConfigError:
            return None
    elif not any(Path(folder).glob("tokenizer*")) and not any(Path(folder).glob("vocab*")):
        return None
    return folder


def _weight_files(name: str, folder: str) -> list[str]:
    """The safetensors of a folder that transformers reads: the only one, or those of its index.

    Raises ConfigError if one is missing, or if the index names anything but safetensors beside it.
    """
    if os.path.exists(os.path.join(folder, "model.safetensors")):
        return ["model.safetensors"]
    if not os.path.exists(os.path.join(folder, INDEX)):
        raise ConfigError(_no_safetensors(name))
    shards = _shards(name, folder)
    missing = [shard for shard in shards if not os.path.exists(os.path.join(folder, shard))]
    if missing:
        raise ConfigError(f"the backbone {name!r} lacks {missing[0]}, which its index names; copy it again")
    return shards


def _shards(name: str, folder: str) -> list[str]:
    """The files that the index of a folder names."""
    try:
        shards = sorted({*json.loads(Path(folder, INDEX).read_text())["weight_map"].values()})
        is_plain = all(os.path.basename(shard) == shard and shard.endswith(".safetensors") for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError):
        shards, is_plain = [], False
    if not is_plain:
        raise ConfigError(
            f"{INDEX} of the backbone {name!r} is damaged or names other files than safetensors beside it; copy the model again"
        )
    return shards


def _no_safetensors(name: str) -> str:
    return (
        f"the backbone {name!r} has no safetensors (model.safetensors, or shards with model.safetensors.index.json); other "
        "formats can run code and are not read: save it with save_pretrained of transformers"
    )


def _digest(name: str, path: str) -> str:
    """The sha256 of a file. The cache of a hub names large files by it: raises ConfigError if the content has another one."""
    blob = os.path.realpath(path)
    stated = os.path.basename(blob)
    if not (os.path.islink(path) and _SHA256.fullmatch(stated)):
        return digest_of_file(path)
    state = os.stat(blob)
    if _digest_of_blob(blob, state.st_size, state.st_mtime_ns) != stated:
        raise ConfigError(
            f"the file {os.path.basename(path)} of the backbone {name!r} is damaged in the cache of this machine (its sha256 "
            f"differs from its name); remove {blob}, and the next run downloads it again"
        )
    return stated


@functools.cache
def _digest_of_blob(blob: str, size: int, mtime_ns: int) -> str:
    """Once per process: stages ask for the digests of a model several times, and its files may take many gigabytes."""
    return digest_of_file(blob)


def _hub() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _sentence(name: str, error: Exception) -> str:
    """What to do about an error of the hub, with the hub's own words."""
    from huggingface_hub import errors

    words = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        advice = "its owner asks for consent: accept the license on its page and set HF_TOKEN on every node"
    elif isinstance(error, errors.RepositoryNotFoundError):
        advice = "no such model is there, or it is private: correct model.backbone, or set HF_TOKEN on every node"
    elif isinstance(error, errors.RevisionNotFoundError):
        advice = "it has no such revision: correct model.revision"
    else:
        advice = (
            "it is neither a folder nor in the cache of this machine, and the hub does not answer: correct model.backbone, "
            "download the model where there is a network and copy the folder, or give a size to build a backbone from scratch"
        )
    return f"the backbone {name!r} cannot be loaded: {advice} ({words})"
