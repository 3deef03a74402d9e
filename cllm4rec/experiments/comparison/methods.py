"""The methods of the comparison: the baselines of the registry, and CLLM4Rec with changed settings (its variants)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from cllm4rec.config import BackboneSize, Config, parse_config
from cllm4rec.errors import ConfigError
from cllm4rec.experiments.baselines.registry import BASELINES, grid_points, trials
from cllm4rec.training.phases import CONTENT, Phase, finetune_phases, pretrain_phases

MODEL = "cllm4rec"


@dataclasses.dataclass(frozen=True)
class Variant:
    """`settings` replace those of the configuration.

    texts: "none" is the paper's LLM-CF: no text documents, no content tables, no regularization towards them. "shuffled" gives
    each text to another item (`controls.shuffled_texts`).
    randomizes_backbone: random weights in the place of a pretrained language model's.
    trains_backbone: the weights of the language model are trained in all phases, together with the tables.
    starts_from_trained: training starts from a language model that was trained on the texts. If `backbone.epochs` is 0, it is
    trained for `compare.backbone_epochs`.
    """

    description: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    texts: Literal["own", "shuffled", "none"] = "own"
    randomizes_backbone: bool = False
    trains_backbone: bool = False
    starts_from_trained: bool = False


_RATES = {"pretrain.learning_rate": 1e-3, "finetune.learning_rate": 5e-4}
"""Upper limits for training the backbone, too: the rates of a configuration are meant for tables."""

VARIANTS: dict[str, Variant] = {
    MODEL: Variant("the method as configured"),
    "cllm4rec_t5": Variant("with a T5 backbone", {"model.backbone.architecture": "t5"}),
    "cllm4rec_llama": Variant("with a Llama-like backbone", {"model.backbone.architecture": "llama"}),
    "llm_scratch": Variant(
        "backbone with random weights, all weights trained", {"backbone.epochs": 0}, trains_backbone=True
    ),
    "llm_cf": Variant("no content model, interactions only", {"model.table_init": "noise"}, texts="none"),
    "llm_ftall": Variant("pretrained backbone, all weights trained", trains_backbone=True, starts_from_trained=True),
    "llm_fixord": Variant("items in a fixed order", {"pretrain.reorder_items": False}),
    "llm_prerec": Variant("pretrained only, no finetuning", {"finetune.epochs": 0}),
    "shuffled_texts": Variant("texts shuffled among each reviewer's items", texts="shuffled"),
    "texts_at_start": Variant("texts only initialize the item embeddings", {"pretrain.text_fraction": 0.0}),
    "noise_at_start": Variant("item embeddings start from noise", {"model.table_init": "noise"}),
    "random_lm": Variant("the pretrained architecture with random weights", randomizes_backbone=True),
}

GRID: Mapping[str, tuple[Any, ...]] = {
    "model.temperature": (1.0, 2.0),
    "pretrain.learning_rate": (3e-3, 1e-3),
    "finetune.target": ("all", "heldout"),
}
"""The grid of variants with a frozen backbone, tried after the configuration's own values."""

FULL_TRAINING_GRID: Mapping[str, tuple[Any, ...]] = {
    "model.temperature": (1.0, 2.0),
    "pretrain.learning_rate": (1e-3, 5e-4),
    "finetune.learning_rate": (5e-4, 1e-4),
}
"""The grid of variants that also train the backbone, which needs lower learning rates."""

MAIN = (MODEL, "llm_cf", "llm_ftall", "no_lm", "multi_vae", "sasrec", "ease", "ials", "popularity")
ALL = (*VARIANTS, *BASELINES)

START_FROM_TRAINED = ("m6_retrieval", *(name for name, variant in VARIANTS.items() if variant.starts_from_trained))
"""Methods that start from a language model trained on the texts, whatever CLLM4Rec starts from."""

DEPENDS_ON = {"cllm4rec_emb": MODEL}
"""Method → the method whose result on the same split it reads."""


def chosen_methods(config: Config) -> list[str]:
    """The methods to run, including those they depend on. Raises ConfigError for an unknown name."""
    chosen = config.compare.methods or list(ALL if config.compare.rows == "all" else MAIN)
    unknown = [name for name in chosen if name not in ALL]
    if unknown:
        raise ConfigError(f"compare.methods has unknown names: {', '.join(unknown)}; use names of {', '.join(ALL)}")
    needed = [DEPENDS_ON[name] for name in chosen if name in DEPENDS_ON]
    return list(dict.fromkeys([*chosen, *needed]))


def grid_points_of(name: str, config: Config) -> list[dict[str, Any]]:
    """The settings to try for a method: at most `compare.trials`, the same for every split."""
    most = config.compare.trials
    if name not in VARIANTS:
        return trials(name, most, config.seed)
    grid, varied = FULL_TRAINING_GRID if VARIANTS[name].trains_backbone else GRID, config_of(name, config, {})
    tried = {key: values for key, values in grid.items() if not _is_unused(key, varied)}
    return grid_points(tried, most, config.seed, first={key: setting(varied, key) for key in tried})


def _is_unused(key: str, config: Config) -> bool:
    """Whether a setting has no effect because its stage has no epochs."""
    return key.startswith("finetune.") and not config.finetune.epochs


def config_of(name: str, config: Config, params: Mapping[str, Any]) -> Config:
    """The configuration of a method, with the settings `params` to try. Raises ConfigError if the settings do not fit."""
    if name == "llm_scratch" and isinstance(config.model.backbone, str):
        raise ConfigError(f"{name} starts from random weights, so model.backbone must be a size to build, not a name")
    settings: dict[str, Any] = dict(VARIANTS[name].settings) if name in VARIANTS else {}
    if _trains_all(name):
        settings |= {key: min(setting(config, key), most) for key, most in _RATES.items()}
    adapter = config.backbone.adapter
    if adapter is not None and (_trains_all(name) or (name == "m6_retrieval" and "backbone" not in adapter.trained_in)):
        settings["backbone.adapter"] = None
    if name in START_FROM_TRAINED and isinstance(config.model.backbone, BackboneSize) and not config.backbone.epochs:
        settings["backbone.epochs"] = config.compare.backbone_epochs
    settings.update(params)
    return with_settings(config, settings, name) if settings else config


def _trains_all(name: str) -> bool:
    """Whether a method trains all weights of the language model, so that it has no adapter."""
    return name in VARIANTS and VARIANTS[name].trains_backbone


def setting(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def with_settings(config: Config, settings: Mapping[str, Any], who: str) -> Config:
    """The configuration with other values for some dotted keys. Raises ConfigError, naming `who`, for an unknown key."""
    raw = config.model_dump(mode="json")
    for key, value in settings.items():
        *sections, last = key.split(".")
        target: Any = raw
        for section in sections:
            target = target.get(section)
            if isinstance(target, str):
                raise ConfigError(f"{who} sets {key}, so model.backbone must be a size to build, not a name")
            if not isinstance(target, dict):
                raise ConfigError(f"{who} sets {key}, which is not a setting")
        target[last] = value
    return parse_config(raw)


def phases_of(name: str, config: Config) -> list[Phase]:
    """The training phases of a variant; `config` is the result of `config_of`."""
    variant = VARIANTS[name]
    phases = [*pretrain_phases(config), *finetune_phases(config)]
    if variant.texts == "none":
        phases = [_without_content(phase) for phase in phases if phase.reads != ("texts",)]
    if variant.trains_backbone:
        phases = [dataclasses.replace(phase, trained=(*phase.trained, "backbone")) for phase in phases]
    return phases


def _without_content(phase: Phase) -> Phase:
    reads = tuple(kind for kind in phase.reads if kind != "texts")
    trained = tuple(table for table in phase.trained if table not in CONTENT)
    return dataclasses.replace(phase, reads=reads, trained=trained, lambda_c=0.0, collaborative_from_content=False)
