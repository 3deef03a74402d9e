"""The three training stages end to end: which directories go in, what is trained, which directory comes out.

Each is `inputs(config)`, the digests by which a stage is skipped or resumed, and `fit(config)`, which writes the directory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cllm4rec.arrays.histories import Histories
from cllm4rec.config import Config
from cllm4rec.data.prepared import documents_by_bucket, load_token_space
from cllm4rec.errors import ArtifactError
from cllm4rec.model.backbone import load_backbone, new_backbone, save_backbone, save_reference
from cllm4rec.model.saved_model import ModelMetadata, Prompt, save_pretrained
from cllm4rec.storage import files
from cllm4rec.storage.artifacts import Manifest, read_manifest, write_directory
from cllm4rec.storage.files import digest_of
from cllm4rec.storage.tensors import save_tensors
from cllm4rec.training.loop import Validation, run_settings
from cllm4rec.training.phases import Phase, backbone_phases, finetune_phases, pretrain_phases
from cllm4rec.training.ray_trainer import METRICS, Job, Start, fit
from cllm4rec.training.table_init import initial_tables

MakeValidation = Callable[[Histories], Validation]


def backbone_inputs(config: Config) -> dict[str, str]:
    prepared = read_manifest(config.run.prepared, "prepared")
    return {
        "prepared": prepared.digest,
        "model": digest_of(config.model.model_dump()),
        "training": _training_digest(config, backbone_phases(config)),
    }


def pretrain_inputs(config: Config) -> dict[str, str]:
    return {
        "prepared": read_manifest(config.run.prepared, "prepared").digest,
        "backbone": read_manifest(config.run.backbone, "backbone").digest,
        "training": _training_digest(config, pretrain_phases(config)),
    }


def finetune_inputs(config: Config) -> dict[str, str]:
    return {
        "prepared": read_manifest(config.run.prepared, "prepared").digest,
        "pretrained": read_manifest(config.run.pretrained, "pretrained").digest,
        "training": _training_digest(config, finetune_phases(config)),
    }


def fit_backbone(config: Config, make_validation: MakeValidation) -> Manifest:
    """Pretrain, or go on training, the language model on the training split's texts; with 0 epochs only write it down."""
    inputs, directory = backbone_inputs(config), config.run.backbone
    prompt_tokens, _ = load_token_space(config.run.prepared)
    backbone = new_backbone(config.model, prompt_tokens.num_words, config.seed)
    phases = backbone_phases(config)
    weights = _train(config, "backbone", phases, inputs, make_validation) if config.backbone.epochs else {}
    with write_directory(directory, kind="backbone", inputs=inputs, config=config.model_dump()) as draft:
        if not weights and isinstance(config.model.backbone, str):
            save_reference(backbone, config.model, draft.uri)
        else:
            # Not strict: tied heads and buffers are no parameters of their own.
            backbone.load_state_dict(
                {name.removeprefix("backbone."): value for name, value in weights.items()}, strict=False
            )
            save_backbone(backbone, draft.uri)
        draft.counts["parameters"] = sum(weight.numel() for weight in backbone.parameters())
        _copy_metrics(config, "backbone", draft.uri)
    _forget_run(config, "backbone")
    return read_manifest(directory, "backbone")


def fit_pretrained(config: Config, make_validation: MakeValidation) -> Manifest:
    """Content warm-up and mutually regularized pretraining of the four tables around the frozen backbone."""
    inputs, fresh = pretrain_inputs(config), _fresh_tables(config)
    start_dir = config.run.unfinished("start")
    with write_directory(start_dir, kind="start", inputs=inputs, config=config.model_dump()) as draft:
        save_tensors(fresh, draft.path("tables.safetensors"))
    start = Start(files.absolute(start_dir), "start")
    tables = fresh | _train(config, "pretrain", pretrain_phases(config), inputs, make_validation, start)
    _forget_run(config, "start")
    return _write_model(config, "pretrained", "interactions", tables, inputs, "pretrain")


def fit_finetuned(config: Config, make_validation: MakeValidation) -> Manifest:
    """Recommendation-oriented finetuning of the collaborative tables: the `model/` that is scored and served."""
    inputs = finetune_inputs(config)
    start = Start(files.absolute(config.run.pretrained), "pretrained")
    trained = _train(config, "finetune", finetune_phases(config), inputs, make_validation, start)
    if finetune_inputs(config) != inputs:
        raise ArtifactError(f"{start.directory} changed while finetune was at work; run the same command again")
    tables = start.tables() | trained
    prompt: Prompt = "recommendation" if config.finetune.epochs else "interactions"
    return _write_model(config, "model", prompt, tables, inputs, "finetune")


def _train(
    config: Config,
    name: str,
    phases: list[Phase],
    inputs: dict[str, str],
    make_validation: MakeValidation,
    start: Start | None = None,
) -> dict[str, Tensor]:
    if not any(stage.epochs for stage in phases):
        return {}
    backbone_dir, frozen = config.run.backbone, name != "backbone"
    before = load_backbone(backbone_dir, config.model.max_tokens).digest() if frozen else None
    job = Job(
        prepared_dir=files.absolute(config.run.prepared),
        backbone_dir=files.absolute(backbone_dir) if frozen else None,
        start=start,
        model=config.model,
        phases=phases,
        settings=run_settings(config),
        make_validation=make_validation,
        fingerprint=digest_of(inputs),
        tensorboard=config.training.tensorboard,
    )
    weights = fit(job, config.cluster, config.run.unfinished(name))
    if frozen and load_backbone(backbone_dir, config.model.max_tokens).digest() != before:
        raise ArtifactError(
            f"the frozen backbone in {backbone_dir} changed during {name}; run the backbone stage with --force"
        )
    return weights


def _fresh_tables(config: Config) -> dict[str, Tensor]:
    """The tables before any training: what pretraining begins from, and a stage of 0 epochs leaves."""
    prepared_dir = config.run.prepared
    _, token_space = load_token_space(prepared_dir)
    backbone = load_backbone(config.run.backbone, config.model.max_tokens)
    return initial_tables(config, backbone, token_space, lambda: documents_by_bucket(prepared_dir))


def _write_model(
    config: Config, kind: str, prompt: Prompt, tables: dict[str, Tensor], inputs: dict[str, str], run_name: str
) -> Manifest:
    prepared_dir, directory = config.run.prepared, config.run.directory(kind)
    prompt_tokens, token_space = load_token_space(prepared_dir)
    facts = ModelMetadata(
        num_words=prompt_tokens.num_words,
        num_users=token_space.num_users,
        num_items=token_space.num_items,
        width=tables["content_items"].shape[1],
        max_tokens=config.model.max_tokens,
        prompt=prompt,
        bf16=config.training.bf16,
        temperature=config.model.temperature,
    )
    with write_directory(directory, kind=kind, inputs=inputs, config=config.model_dump()) as draft:
        save_pretrained(draft, tables, facts, prepared_dir=prepared_dir, backbone_dir=config.run.backbone)
        _copy_metrics(config, run_name, draft.uri)
    _forget_run(config, run_name)
    return read_manifest(directory, kind)


def _copy_metrics(config: Config, name: str, directory: str) -> None:
    source = files.join(config.run.unfinished(name), METRICS)
    if files.exists(source):
        files.copy_file(source, files.join(directory, METRICS))


def _forget_run(config: Config, name: str) -> None:
    files.remove_directory(config.run.unfinished(name))


def _training_digest(config: Config, phases: list[Phase]) -> str:
    """What a result depends on. The number of workers is left out: a run may go on with other hardware."""
    settings: dict[str, Any] = dataclasses.asdict(run_settings(config))
    del settings["checkpoint_every_epochs"], settings["accumulation"]
    return digest_of(
        {
            "stages": [dataclasses.asdict(stage) for stage in phases],
            "settings": settings,
            "global_batch_tokens": config.training.global_batch_tokens,
            "table_std": config.model.table_std,
            "table_init": config.model.table_init,
            "temperature": config.model.temperature,
        }
    )
