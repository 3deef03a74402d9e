"""A training schedule that fits the data, for the settings that a config leaves open (null).

    config = resolved(config, read_manifest(config.run.prepared, "prepared"))

Small data need many epochs of small steps, large data few epochs of large ones: what counts is the number of optimizer
steps, and that texts do not take most of the time. The figures below are those that the shipped configs of three data sets
ended with (docs/method.md). The schedule depends on the data alone, never on the machine, so that a run may continue on
other hardware; how long it takes there is logged before the first epoch.
"""

from __future__ import annotations

from typing import Any, TypeVar

from cllm4rec.config import Config, parse_config
from cllm4rec.storage.artifacts import Manifest

T = TypeVar("T")

STEPS_PER_EPOCH = 64
"""Steps of a pretraining epoch that the batch size aims at."""
MIN_BATCH_TOKENS, MAX_BATCH_TOKENS = 512, 4096
PRETRAIN_STEPS, PRETRAIN_EPOCHS = 2000, (8, 40)
FINETUNE_STEPS, FINETUNE_EPOCHS = 1000, (8, 60)
"""Steps that the number of epochs aims at, and its bounds; `patience` ends most runs earlier."""
TEXTS_PER_HISTORY = 3.0
"""Tokens of texts that an epoch reads for each token of a history."""
_PROMPT_TOKENS = 6
"""Of a document's prompt, about."""


def resolved(config: Config, prepared: Manifest) -> Config:
    """The config with every open setting of the schedule set. Settings that are not null stay as they are."""
    history, text = _tokens(prepared)
    pretrain, finetune, training = config.pretrain, config.finetune, config.training
    text_fraction = pretrain.text_fraction
    if text_fraction is None:
        text_fraction = float(f"{min(1.0, TEXTS_PER_HISTORY * history / max(text, 1)):.2g}") or 0.01
    epoch_tokens = history + text_fraction * text
    batch = training.micro_batch_tokens or _batch_tokens(epoch_tokens, config.model.max_tokens)
    step = training.global_batch_tokens or batch * config.cluster.num_workers
    changes: dict[str, dict[str, Any]] = {
        "training": {"micro_batch_tokens": batch},
        "pretrain": {
            "text_fraction": text_fraction,
            "epochs": _epochs(pretrain.epochs, PRETRAIN_STEPS, epoch_tokens / step, PRETRAIN_EPOCHS),
        },
        "finetune": {"epochs": _epochs(finetune.epochs, FINETUNE_STEPS, history / step, FINETUNE_EPOCHS)},
    }
    raw = config.model_dump()
    for section, values in changes.items():
        raw[section] |= values
    return parse_config(raw)


def _tokens(prepared: Manifest) -> tuple[float, float]:
    """Tokens of all histories and of all texts of an epoch, prompts included."""
    history = text = 0.0
    for kind, num_tokens in prepared.counts.get("tokens", {}).items():
        total = num_tokens + _PROMPT_TOKENS * prepared.counts["documents"][kind]
        if kind == "interactions":
            history += total
        else:
            text += total
    return max(history, 1.0), text


def _batch_tokens(epoch_tokens: float, max_tokens: int) -> int:
    """A power of two, at least the longest document."""
    wanted = max(MIN_BATCH_TOKENS, min(MAX_BATCH_TOKENS, epoch_tokens / STEPS_PER_EPOCH))
    batch = 1 << (int(wanted).bit_length() - 1)
    return max(batch, max_tokens)


def _epochs(given: int | None, steps: int, steps_per_epoch: float, bounds: tuple[int, int]) -> int:
    least, most = bounds
    return given if given is not None else max(least, min(most, round(steps / max(steps_per_epoch, 1.0))))


def fixed(value: T | None) -> T:
    """A setting of the schedule after `resolved`."""
    assert value is not None, "an open setting of the schedule is read before it is resolved"
    return value
