"""The three training stages: their input directories, what they train, and the directory that they write.

`<stage>_inputs(config)` returns the digests that decide whether a stage is up to date and which run it resumes. The stage
itself writes its directory. `trainer` runs the loop: `ray_trainer.train_on_ray` on a cluster, or
`local_trainer.train_locally` in this process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from cllm4rec.config import Config
from cllm4rec.data.prepared import documents_by_bucket, load_token_space
from cllm4rec.errors import ArtifactError
from cllm4rec.model.adapter import is_adapter
from cllm4rec.model.backbone_files import (
    check_same_base,
    empty_backbone,
    load_backbone,
    save_adapter_weights,
    save_trained,
    verify_backbone,
)
from cllm4rec.model.saved_model import ModelMetadata, Prompt, save_pretrained
from cllm4rec.model.stock_backbone import check_stock_backbone
from cllm4rec.staleness import settings_digest
from cllm4rec.storage import files
from cllm4rec.storage.artifacts import Manifest, read_manifest, write_directory
from cllm4rec.storage.files import digest_of
from cllm4rec.storage.tensors import save_tensors
from cllm4rec.training.job import METRICS, Start, TrainJob
from cllm4rec.training.phases import Phase, backbone_phases, finetune_phases, pretrain_phases
from cllm4rec.training.schedule import resolved
from cllm4rec.training.table_init import initial_tables

logger = logging.getLogger(__name__)

Trainer = Callable[[TrainJob, str], dict[str, Tensor]]
"""Trains a job. The second argument is the directory for metrics and checkpoints. Returns the weights of the best epochs."""


def scheduled(config: Config) -> Config:
    """The config with the schedule that fits the prepared data. Raises ArtifactError if nothing is prepared."""
    return resolved(config, read_manifest(config.run.prepared, "prepared"))


def backbone_inputs(config: Config) -> dict[str, str]:
    """The digests that `backbone/` depends on."""
    return _inputs(config, "backbone", "prepared")


def pretrain_inputs(config: Config) -> dict[str, str]:
    """The digests that `pretrained/` depends on."""
    return _inputs(config, "pretrain", "prepared", "backbone")


def finetune_inputs(config: Config) -> dict[str, str]:
    """The digests that `model/` depends on."""
    return _inputs(config, "finetune", "prepared", "pretrained")


def _inputs(config: Config, stage: str, *kinds: str) -> dict[str, str]:
    """The digests of the directories that a stage reads, and of its settings."""
    directories = {kind: read_manifest(config.run.directory(kind), kind).digest for kind in kinds}
    # `backbone/` stays the same when a later stage begins to train its adapter.
    adapter = {"adapter": "trained"} if stage != "backbone" and config.backbone.trains_adapter(stage) else {}
    return directories | {"settings": settings_digest(scheduled(config), stage)} | adapter


def train_backbone(config: Config, force: bool, *, trainer: Trainer) -> Manifest:
    """Train the language model on the texts of the training split → `backbone/`. With 0 epochs it is written untrained.

    Raises ConfigError if `model.id_width` is above the width of the language model.
    """
    config = _begin(config, "backbone", force)
    inputs, directory = backbone_inputs(config), config.run.backbone
    prompt_tokens, _ = load_token_space(config.run.prepared)
    model, num_words = config.model, prompt_tokens.num_words
    check_stock_backbone(model, num_words)
    weights = _train(config, "backbone", backbone_phases(config), inputs, trainer)
    with write_directory(directory, kind="backbone", inputs=inputs, config=config.model_dump()) as draft:
        trained = {name.removeprefix("backbone."): value for name, value in weights.items()}
        save_trained(config, num_words, trained, draft.uri)
        draft.counts["parameters"] = sum(weight.numel() for weight in empty_backbone(model, num_words).parameters())
        _copy_metrics(config, "backbone", draft.uri)
    files.remove_directory(config.run.unfinished("backbone"))
    return read_manifest(directory, "backbone")


def pretrain(config: Config, force: bool, *, trainer: Trainer) -> Manifest:
    """Content warm-up and mutually regularized pretraining of the four tables around the frozen backbone → `pretrained/`."""
    config = _begin(config, "pretrain", force)
    inputs, initial = pretrain_inputs(config), _initial_tables(config)
    start_dir = config.run.unfinished("start")
    with write_directory(start_dir, kind="start", inputs=inputs, config=config.model_dump()) as draft:
        save_tensors(initial, draft.path("tables.safetensors"))
    start = Start(files.absolute(start_dir), "start")
    backbone_dir = config.run.backbone
    weights = initial | _train(config, "pretrain", pretrain_phases(config), inputs, trainer, start, backbone_dir)
    files.remove_directory(start_dir)
    return _write_model(config, "pretrained", "interactions", weights, inputs, "pretrain", backbone_dir)


def finetune(config: Config, force: bool, *, trainer: Trainer) -> Manifest:
    """Recommendation-oriented finetuning of the collaborative tables → `model/`, the model that scores and serves.

    Raises ArtifactError if `pretrained/` has parameters of another form, or if it changes during training.
    """
    config = _begin(config, "finetune", force)
    inputs = finetune_inputs(config)
    _check_pretrained(config)
    start = Start(files.absolute(config.run.pretrained), "pretrained")
    # Not backbone/: pretraining may have trained the adapter further.
    backbone_dir = files.join(config.run.pretrained, "backbone")
    trained = _train(config, "finetune", finetune_phases(config), inputs, trainer, start, backbone_dir)
    if finetune_inputs(config) != inputs:
        raise ArtifactError(f"{start.directory} changed during finetuning; run the same command again")
    weights = start.tables() | trained
    prompt: Prompt = "recommendation" if config.finetune.epochs else "interactions"
    return _write_model(config, "model", prompt, weights, inputs, "finetune", backbone_dir)


def _check_pretrained(config: Config) -> None:
    """Raise ArtifactError if `pretrained/` has parameters of another form than the config."""
    pretrained = ModelMetadata.load(config.run.pretrained)
    forms = {
        "id_width": (pretrained.id_width, config.model.id_width),
        "history": tuple(
            "residual" if residual else "lm" for residual in (pretrained.residual, config.model.is_residual)
        ),
    }
    for setting, (found, wanted) in forms.items():
        if found != wanted:
            raise ArtifactError(
                f"{config.run.pretrained} was trained with model.{setting} {found or 'null'}, but the config has "
                f"{wanted or 'null'}; run the pretrain stage with this config first"
            )


def _begin(config: Config, stage: str, force: bool) -> Config:
    """The config with its schedule. With `force` an interrupted run of the stage is forgotten, not resumed."""
    if force:
        files.remove_directory(config.run.unfinished(stage))
    return scheduled(config)


def _train(
    config: Config,
    stage: str,
    phases: list[Phase],
    inputs: dict[str, str],
    trainer: Trainer,
    start: Start | None = None,
    backbone_dir: str | None = None,
) -> dict[str, Tensor]:
    """backbone_dir: the frozen backbone. None: the untrained one that the config describes."""
    if not any(phase.epochs for phase in phases):
        return {}
    validated = [phase for phase in phases if phase.validate and phase.epochs]
    if validated and not config.data.split.has_validation:
        logger.warning(
            f"{stage}: no item is held out for validation (data.split.validation), so all {validated[-1].epochs} epochs run and "
            f"the last one is kept; set {stage}.epochs to the best epoch of a run with validation"
        )
    if backbone_dir is not None:
        verify_backbone(config.run.backbone)
        check_same_base(backbone_dir, config.run.backbone)
    job = TrainJob(
        config=config,
        phases=phases,
        prepared_dir=files.absolute(config.run.prepared),
        backbone_dir=None if backbone_dir is None else files.absolute(backbone_dir),
        start=start,
        fingerprint=digest_of(inputs),
    )
    weights = trainer(job, config.run.unfinished(stage))
    if backbone_dir is not None:
        verify_backbone(config.run.backbone)
    return weights


def _initial_tables(config: Config) -> dict[str, Tensor]:
    """The tables before training. A stage with 0 epochs writes them unchanged."""
    prepared_dir = config.run.prepared
    _, token_space = load_token_space(prepared_dir)
    # Only the word embeddings are read: the weights stay memory-mapped.
    backbone = load_backbone(config.run.backbone, config.model.max_tokens, dtype=None, merge=False)
    return initial_tables(config, backbone, token_space, lambda: documents_by_bucket(prepared_dir))


def _write_model(
    config: Config,
    kind: str,
    prompt: Prompt,
    weights: dict[str, Tensor],
    inputs: dict[str, str],
    stage: str,
    backbone_dir: str,
) -> Manifest:
    """weights: the tables and the dense parameters beside them, and the matrices of an adapter if it was trained."""
    tables = {name: weight for name, weight in weights.items() if not is_adapter(name)}
    adapter = {name.removeprefix("backbone."): weight for name, weight in weights.items() if is_adapter(name)}
    prepared_dir, directory = config.run.prepared, config.run.directory(kind)
    prompt_tokens, token_space = load_token_space(prepared_dir)
    metadata = ModelMetadata(
        num_words=prompt_tokens.num_words,
        num_users=token_space.num_users,
        num_items=token_space.num_items,
        width=tables["content_items"].shape[1],
        max_tokens=config.model.max_tokens,
        prompt=prompt,
        bf16=config.training.bf16,
        temperature=config.model.temperature,
        id_width=config.model.id_width,
        residual=config.model.is_residual or None,
    )
    with write_directory(directory, kind=kind, inputs=inputs, config=config.model_dump()) as draft:
        save_pretrained(draft, tables, metadata, prepared_dir=prepared_dir, backbone_dir=backbone_dir)
        save_adapter_weights(adapter, draft.path("backbone"))
        _copy_metrics(config, stage, draft.uri)
    files.remove_directory(config.run.unfinished(stage))
    return read_manifest(directory, kind)


def _copy_metrics(config: Config, stage: str, directory: str) -> None:
    source = files.join(config.run.unfinished(stage), METRICS)
    if files.exists(source):
        files.copy_file(source, files.join(directory, METRICS))
