"""Which settings decide what a stage writes: whole sections of the config, less a named list of exclusions.

A stage is up to date while the digests of its inputs are those in its manifest. A setting that is new in a section counts
at once; only one that is named here does not, so a forgotten setting can make a stage run once more, never keep a stale
result.
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
"""Stage → the sections it reads. The directories it reads are inputs of their own, by their digests."""

_TRAINING = {"training.checkpoint_every_epochs", "training.tensorboard"}
EXCLUDED = {
    "prepare": {"data.expected"},  # checked, not written; its own input
    "backbone": _TRAINING | {"model.table_std", "model.table_init", "model.temperature"},
    # The backbone's own settings are in the digest of backbone/.
    "pretrain": _TRAINING | {"model.backbone", "model.revision"},
    "finetune": _TRAINING | {"model.backbone", "model.revision", "model.table_std", "model.table_init"},
    "evaluate": set(),
    # Files of rules count by their content.
    "score": {"score.num_actors", "score.batch_users", "score.rules"},
}
"""Stage → the settings of its sections that change nothing it writes."""


def settings_digest(config: Config, stage: str) -> str:
    """sha256 of all settings that decide what a stage writes.

    `cluster` is in no section: a run may continue with another number of workers.
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
