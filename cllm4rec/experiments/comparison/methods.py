"""What each row of the comparison means: a baseline of the registry, or CLLM4Rec's one model and loop under other settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from cllm4rec.config import BackboneSize, Config, parse_config
from cllm4rec.errors import ConfigError
from cllm4rec.experiments.baselines.registry import BASELINES, points, trials
from cllm4rec.training.phases import CONTENT, Phase, finetune_phases, pretrain_phases

MODEL = "cllm4rec"


@dataclasses.dataclass(frozen=True)
class Variant:
    """`settings` replace those of the config.

    reads_texts: False is the paper's LLM-CF: no text documents, no content tables, nothing that pulls towards them.
    trains_backbone: the language model's weights are trained in every stage, beside the tables.
    begins_trained: from a language model that was trained on the texts, for `compare.backbone_epochs` where
    `backbone.epochs` is 0.
    """

    what: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads_texts: bool = True
    trains_backbone: bool = False
    begins_trained: bool = False


_RATES = {"pretrain.learning_rate": 1e-3, "finetune.learning_rate": 5e-4}
"""The highest that a backbone can bear which is trained, too: a config's are for tables."""

VARIANTS: dict[str, Variant] = {
    MODEL: Variant("the method as configured"),
    "cllm4rec_t5": Variant("with a T5 backbone", {"model.backbone.architecture": "t5"}),
    "cllm4rec_llama": Variant("with a Llama-like backbone", {"model.backbone.architecture": "llama"}),
    "llm_scratch": Variant("backbone not pretrained, all trained", {"backbone.epochs": 0}, trains_backbone=True),
    "llm_cf": Variant("no content model, interactions alone", {"model.table_init": "noise"}, reads_texts=False),
    "llm_ftall": Variant("backbone pretrained and trained on", trains_backbone=True, begins_trained=True),
    "llm_fixord": Variant("items in a fixed order", {"pretrain.reorder_items": False}),
    "llm_prerec": Variant("pretrained only, no finetuning", {"finetune.epochs": 0}),
}

GRID: Mapping[str, tuple[Any, ...]] = {
    "model.temperature": (1.0, 2.0),
    "pretrain.learning_rate": (3e-3, 1e-3),
    "finetune.target": ("all", "heldout"),
}
"""What may be tried of every variant around a frozen backbone, after the config's own values."""

WHOLE_GRID: Mapping[str, tuple[Any, ...]] = {
    "model.temperature": (1.0, 2.0),
    "pretrain.learning_rate": (1e-3, 5e-4),
    "finetune.learning_rate": (5e-4, 1e-4),
}
"""The same where the backbone is trained too: its weights bear less."""

MAIN = (MODEL, "llm_cf", "llm_ftall", "multi_vae", "sasrec", "ease", "ials", "popularity")
ALL = (*VARIANTS, *BASELINES)

BEGIN_TRAINED = ("m6_retrieval", *(name for name, variant in VARIANTS.items() if variant.begins_trained))
"""Rows that begin from a language model trained on the texts, whatever CLLM4Rec begins from."""

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
    grid, varied = WHOLE_GRID if VARIANTS[name].trains_backbone else GRID, config_of(name, config, {})
    tried = {key: values for key, values in grid.items() if not _is_moot(key, varied)}
    return points(tried, most, config.seed, first={key: setting(varied, key) for key in tried})


def _is_moot(key: str, config: Config) -> bool:
    """Whether a setting decides nothing because its stage has no epochs."""
    return key.startswith("finetune.") and not config.finetune.epochs


def config_of(name: str, config: Config, params: Mapping[str, Any]) -> Config:
    """The config as a method changes it, with what is tried of a variant. Raises ConfigError where they do not fit."""
    if name == "llm_scratch" and isinstance(config.model.backbone, str):
        raise ConfigError(
            f"{name} begins from random weights, so it needs model.backbone to be a size to build, not a name"
        )
    settings: dict[str, Any] = dict(VARIANTS[name].settings) if name in VARIANTS else {}
    if name in VARIANTS and VARIANTS[name].trains_backbone:
        settings |= {key: min(setting(config, key), most) for key, most in _RATES.items()}
    if name in BEGIN_TRAINED and isinstance(config.model.backbone, BackboneSize) and not config.backbone.epochs:
        settings["backbone.epochs"] = config.compare.backbone_epochs
    settings.update(params)
    return with_settings(config, settings, name) if settings else config


def setting(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


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


def phases_of(name: str, config: Config) -> list[Phase]:
    """The stages that a variant is trained through; `config` as `config_of` gives it."""
    variant = VARIANTS[name]
    phases = [*pretrain_phases(config), *finetune_phases(config)]
    if not variant.reads_texts:
        phases = [_without_content(phase) for phase in phases if phase.reads != ("texts",)]
    if variant.trains_backbone:
        phases = [dataclasses.replace(phase, trained=(*phase.trained, "backbone")) for phase in phases]
    return phases


def _without_content(phase: Phase) -> Phase:
    reads = tuple(kind for kind in phase.reads if kind != "texts")
    trained = tuple(table for table in phase.trained if table not in CONTENT)
    return dataclasses.replace(phase, reads=reads, trained=trained, lambda_c=0.0, collaborative_from_content=False)
