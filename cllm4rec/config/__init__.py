"""One configuration for a whole run: read from YAML, overridden by `section.key=value`, checked, and then frozen.

config = load_config("demo", ["pretrain.epochs=5"])
"""

from cllm4rec.config.loading import load_config, parse_config, parse_section
from cllm4rec.config.schema import (
    MAX_ID_CHARS,
    Adapter,
    BackboneConfig,
    BackboneSize,
    ClusterConfig,
    Columns,
    Config,
    DataConfig,
    DriftLimits,
    EvaluateConfig,
    FinetuneConfig,
    Format,
    ModelConfig,
    Positive,
    PretrainConfig,
    RulesConfig,
    ServeConfig,
    Source,
    Split,
    Sweep,
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
