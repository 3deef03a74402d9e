"""What each row of the comparison means: a baseline of the registry, or CLLM4Rec's one model and loop under other settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cllm4rec.baselines.registry import BASELINES, points, trials
from cllm4rec.config import Config, parse_config
from cllm4rec.errors import ConfigError
from cllm4rec.training.stages import CONTENT, Stage, finetune_stages, pretrain_stages

MODEL = "cllm4rec"


@dataclasses.dataclass(frozen=True)
class Variant:
    """`settings` replace those of the config.

    reads_texts: False is the paper's LLM-CF: no text documents, no content tables, nothing that pulls towards them.
    trains_backbone: the language model's weights are trained in every stage, beside the tables.
    """

    what: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads_texts: bool = True
    trains_backbone: bool = False


VARIANTS: dict[str, Variant] = {
    MODEL: Variant("the method as configured"),
    "cllm4rec_t5": Variant("with a T5 backbone", {"model.backbone.architecture": "t5"}),
    "cllm4rec_llama": Variant("with a Llama-like backbone", {"model.backbone.architecture": "llama"}),
    "llm_scratch": Variant("backbone not pretrained, all trained", {"backbone.epochs": 0}, trains_backbone=True),
    "llm_cf": Variant("no content model, interactions alone", reads_texts=False),
    "llm_ftall": Variant("backbone trained too", trains_backbone=True),
    "llm_fixord": Variant("items in a fixed order", {"pretrain.reorder_items": False}),
    "llm_prerec": Variant("pretrained only, no finetuning", {"finetune.epochs": 0}),
}

GRID: Mapping[str, tuple[Any, ...]] = {
    "model.temperature": (5.0, 3.0, 1.0),
    "pretrain.learning_rate": (5e-3, 2e-3),
    "finetune.target": ("all", "heldout"),
}
"""What may be tried of every variant around a frozen backbone, beside the config's own values."""

WHOLE_GRID: Mapping[str, tuple[Any, ...]] = {
    "model.temperature": (5.0, 1.0),
    "pretrain.learning_rate": (1e-3, 5e-4),
    "finetune.learning_rate": (5e-4, 1e-4),
}
"""The same where the backbone is trained too: its weights bear less."""

MAIN = (MODEL, "llm_cf", "llm_ftall", "multi_vae", "sasrec", "ease", "ials", "popularity")
ALL = (*VARIANTS, *BASELINES)

AFTER = {"cllm4rec_emb": MODEL}
"""Rows that read what another row of the same split has learnt."""


def chosen_methods(config: Config) -> list[str]:
    """The rows to run, with those they need. Raises ConfigError for a name that is none."""
    chosen = config.compare.methods or list(ALL if config.compare.rows == "all" else MAIN)
    unknown = [name for name in chosen if name not in ALL]
    if unknown:
        raise ConfigError(f"compare.methods names {', '.join(unknown)}; use names of {', '.join(ALL)}")
    needed = [AFTER[name] for name in chosen if name in AFTER]
    return list(dict.fromkeys([*chosen, *needed]))


def points_of(name: str, config: Config) -> list[dict[str, Any]]:
    """What is tried of a method: at most `compare.trials` settings, the same for every split."""
    most = config.compare.trials
    if name not in VARIANTS:
        return trials(name, most, config.seed)
    grid = WHOLE_GRID if VARIANTS[name].trains_backbone else GRID
    varied = {key: values for key, values in grid.items() if not _is_moot(key, config_of(name, config, {}))}
    return points(varied, most, config.seed)


def _is_moot(key: str, config: Config) -> bool:
    """Whether a setting decides nothing because its stage has no epochs."""
    return key.startswith("finetune.") and not config.finetune.epochs


def config_of(name: str, config: Config, params: Mapping[str, Any]) -> Config:
    """The config of a variant with what is tried of it. Raises ConfigError where the two do not fit."""
    if name == "llm_scratch" and isinstance(config.model.backbone, str):
        raise ConfigError(
            f"{name} begins from random weights, so it needs model.backbone to be a size to build, not a name"
        )
    return with_settings(config, {**VARIANTS[name].settings, **params}, name)


def with_settings(config: Config, settings: Mapping[str, Any], who: str) -> Config:
    """The config with some dotted keys set to other values. Raises ConfigError where `who` asks for what is none."""
    raw = config.model_dump(mode="json")
    for key, value in settings.items():
        *sections, last = key.split(".")
        target: Any = raw
        for section in sections:
            target = target.get(section)
            if isinstance(target, str):
                raise ConfigError(f"{who} sets {key}, so it needs model.backbone to be a size to build, not a name")
            if not isinstance(target, dict):
                raise ConfigError(f"{who} sets {key}, which is no setting")
        target[last] = value
    return parse_config(raw)


def stages_of(name: str, config: Config) -> list[Stage]:
    """The stages that a variant is trained through; `config` as `config_of` gives it."""
    variant = VARIANTS[name]
    stages = [*pretrain_stages(config), *finetune_stages(config)]
    if not variant.reads_texts:
        stages = [_without_content(stage) for stage in stages if stage.reads != ("texts",)]
    if variant.trains_backbone:
        stages = [dataclasses.replace(stage, trained=(*stage.trained, "backbone")) for stage in stages]
    return stages


def _without_content(stage: Stage) -> Stage:
    reads = tuple(kind for kind in stage.reads if kind != "texts")
    trained = tuple(table for table in stage.trained if table not in CONTENT)
    return dataclasses.replace(stage, reads=reads, trained=trained, lambda_c=0.0, collaborative_from_content=False)
