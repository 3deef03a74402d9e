"""The configuration of a run: all its sections, and what holds between them.

The sections are defined beside this file: every setting, its range and its meaning. Values that follow from others (accumulation,
directories) are properties, not settings. `python -m cllm4rec.config.reference` writes docs/config.md from the descriptions.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Self

from pydantic import Field, model_validator

from cllm4rec.config.base import Section
from cllm4rec.config.data import DataConfig
from cllm4rec.config.experiments import ColdStartConfig, CompareConfig, EvaluateConfig
from cllm4rec.config.operation import (
    ClusterConfig,
    ExtendConfig,
    NightlyConfig,
    PromoteConfig,
    ScoreConfig,
    ServeConfig,
)
from cllm4rec.config.training import BackboneConfig, FinetuneConfig, ModelConfig, PretrainConfig, TrainingConfig
from cllm4rec.run import Run


class Config(Section):
    """A whole run. Most sections are named after the stage that reads them."""

    output_dir: Annotated[str, Field(min_length=1)] = Field(
        description="Directory of the run, a local path or an fsspec URI. Every stage writes below it."
    )
    seed: int = Field(
        0,
        description="Seed of initial embeddings, orders, masks and bootstrap samples. The split has its own, "
        "data.split.seed.",
    )
    run_date: datetime.date | None = Field(
        None, description="Date written to every row of the published table. null: today (UTC)."
    )
    data: DataConfig
    model: ModelConfig = ModelConfig()
    backbone: BackboneConfig = BackboneConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    training: TrainingConfig = TrainingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()
    coldstart: ColdStartConfig = ColdStartConfig()
    score: ScoreConfig = ScoreConfig()
    nightly: NightlyConfig = NightlyConfig()
    extend: ExtendConfig = ExtendConfig()
    promote: PromoteConfig = PromoteConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        micro, longest = self.training.micro_batch_tokens, self.model.max_tokens
        if micro is None:
            if self.training.global_batch_tokens is not None:
                raise ValueError("training.global_batch_tokens needs training.micro_batch_tokens; set both")
            return self
        if micro < longest:
            raise ValueError(
                f"training.micro_batch_tokens {micro} cannot hold a document of model.max_tokens {longest}; "
                f"use {longest} or more"
            )
        everyone = micro * self.cluster.num_workers
        total = self.training.global_batch_tokens
        if total is not None and total % everyone:
            fits = max(everyone, total // everyone * everyone)
            raise ValueError(
                f"training.global_batch_tokens {total} does not divide by {self.cluster.num_workers} workers × "
                f"training.micro_batch_tokens {micro}; use {fits} or {fits + everyone}"
            )
        return self

    @model_validator(mode="after")
    def _the_engine_can_alternate(self) -> Self:
        if self.pretrain.alternate and self.training.engine == "deepspeed":
            raise ValueError(
                "pretrain.alternate needs training.engine: torch; DeepSpeed gives a frozen table zero gradients, and "
                "Adam's momentum would still move it"
            )
        return self

    @model_validator(mode="after")
    def _texts_leave_room_for_the_prompt(self) -> Self:
        if self.data.max_text_tokens > self.model.max_tokens - 16:
            raise ValueError(
                f"data.max_text_tokens {self.data.max_text_tokens} leaves no room for the prompt in "
                f"model.max_tokens {self.model.max_tokens}; use at most {self.model.max_tokens - 16}"
            )
        return self

    @property
    def accumulation(self) -> int:
        """Micro-batches per worker in one optimizer step."""
        total, micro = self.training.global_batch_tokens, self.training.micro_batch_tokens
        return 1 if total is None or micro is None else total // (micro * self.cluster.num_workers)

    @property
    def run(self) -> Run:
        """The directories below `output_dir`."""
        return Run(self.output_dir)
