"""One configuration for a whole run: read from YAML, overridden by `section.key=value`, checked, and then frozen.

config = load_config("demo", ["pretrain.epochs=5"])
"""

from cllm4rec.config.base import Positive
from cllm4rec.config.data import MAX_ID_CHARS, Columns, DataConfig, Format, Source, Split
from cllm4rec.config.experiments import EvaluateConfig, Sweep
from cllm4rec.config.loading import load_config, parse_config, parse_section
from cllm4rec.config.operation import ClusterConfig, DriftLimits, RulesConfig, ServeConfig
from cllm4rec.config.schema import Config
from cllm4rec.config.training import (
    Adapter,
    BackboneConfig,
    BackboneSize,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    TrainingConfig,
)

__all__ = [
    "MAX_ID_CHARS",
    "Adapter",
    "BackboneConfig",
    "BackboneSize",
    "ClusterConfig",
    "Columns",
    "Config",
    "DataConfig",
    "DriftLimits",
    "EvaluateConfig",
    "FinetuneConfig",
    "Format",
    "ModelConfig",
    "Positive",
    "PretrainConfig",
    "RulesConfig",
    "ServeConfig",
    "Source",
    "Split",
    "Sweep",
    "TrainingConfig",
    "load_config",
    "parse_config",
    "parse_section",
]
