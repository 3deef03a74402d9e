"""Decides which settings determine the output of a stage: whole sections of the config minus named exclusions.

A stage is up to date if the digests of its inputs equal those in its manifest. A setting that is added to a section counts
unless it is excluded here. A forgotten exclusion can therefore cause an unnecessary run, but never a stale result.
"""

from __future__ import annotations

from typing import Any

from cllm4rec.config import Config
from cllm4rec.storage.files import digest_of

SECTIONS = {
    "prepare": ("data",),
    "backbone": ("seed", "model", "backbone", "training"),
    "pretrain": ("seed", "model", "pretrain", "training"),
    "finetune": ("seed", "model", "finetune", "training"),
    "evaluate": ("seed", "evaluate"),
    "score": ("score",),
}
"""Stage → the config sections that it reads. The directories that it reads are separate inputs, with their own digests."""

_TRAINING = {
    "training.checkpoint_every_epochs",
    "training.tensorboard",
    "training.gradient_checkpointing",
    "training.cpu_offload",
}
EXCLUDED = {
    "prepare": {"data.expected"},  # verified, not written; a separate input
    "backbone": _TRAINING
    | {"model.history", "model.table_std", "model.table_init", "model.temperature", "model.id_width"}
    | {"training.validate_every_epochs"},
    # The digest of backbone/ covers the settings of the backbone.
    "pretrain": _TRAINING | {"model.backbone", "model.revision", "model.store_backbone"},
    "finetune": _TRAINING
    | {"model.backbone", "model.revision", "model.store_backbone", "model.table_std", "model.table_init"},
    "evaluate": set(),
    # Rule files are inputs by their content.
    "score": {"score.num_actors", "score.batch_users", "score.rules"},
}
"""Stage → the settings of its sections that do not affect its output."""


def settings_digest(config: Config, stage: str) -> str:
    """sha256 of all settings that determine the output of a stage.

    No stage includes the section `cluster`: a run may resume with another number of workers.
    """
    dumped = config.model_dump(mode="json", exclude_none=True)
    kept = {section: dumped[section] for section in SECTIONS[stage] if section in dumped}
    return digest_of({key: _without(value, key, EXCLUDED[stage]) for key, value in kept.items()})


def _without(value: Any, key: str, excluded: set[str]) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        name: _without(inner, f"{key}.{name}", excluded)
        for name, inner in value.items()
        if f"{key}.{name}" not in excluded
    }
