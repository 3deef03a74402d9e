"""The three training stages end to end: which directories go in, what is trained, which directory comes out.

Each is `inputs(config)`, the digests by which a stage is skipped or resumed, and `fit(config)`, which writes the directory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cllm4rec import artifacts
from cllm4rec.artifacts import Manifest, digest_of, read_manifest, write_directory
from cllm4rec.config import Config
from cllm4rec.data.prepared import Histories, documents_by_bucket, load_space
from cllm4rec.errors import ArtifactError
from cllm4rec.model.backbone import load_backbone, new_backbone, save_backbone, save_reference
from cllm4rec.model.store import ModelFacts, Prompt, write_model
from cllm4rec.model.tensors import save_tensors
from cllm4rec.training.from_texts import fresh_tables
from cllm4rec.training.loop import METRICS, Job, Start, fit
from cllm4rec.training.run import Validation, run_settings
from cllm4rec.training.stages import Stage, backbone_stages, finetune_stages, pretrain_stages

MakeValidation = Callable[[Histories], Validation]


def backbone_inputs(config: Config) -> dict[str, str]:
    prepared = read_manifest(config.directory("prepared"), "prepared")
    return {
        "prepared": prepared.digest,
        "model": digest_of(config.model.model_dump()),
        "training": _training_digest(config, backbone_stages(config)),
    }


def pretrain_inputs(config: Config) -> dict[str, str]:
    return {
        "prepared": read_manifest(config.directory("prepared"), "prepared").digest,
        "backbone": read_manifest(config.directory("backbone"), "backbone").digest,
        "training": _training_digest(config, pretrain_stages(config)),
    }


def finetune_inputs(config: Config) -> dict[str, str]:
    return {
        "prepared": read_manifest(config.directory("prepared"), "prepared").digest,
        "pretrained": read_manifest(config.directory("pretrained"), "pretrained").digest,
        "training": _training_digest(config, finetune_stages(config)),
    }


def fit_backbone(config: Config, make_validation: MakeValidation) -> Manifest:
    """Pretrain, or go on training, the language model on the training split's texts; with 0 epochs only write it down."""
    inputs, directory = backbone_inputs(config), config.directory("backbone")
    language, _ = load_space(config.directory("prepared"))
    backbone = new_backbone(config.model, language.num_words, config.seed)
    stages = backbone_stages(config)
    weights = _train(config, "backbone", stages, inputs, make_validation) if config.backbone.epochs else {}
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
    """Content warm-up and mutually regularised pretraining of the four tables around the frozen backbone."""
    inputs, fresh = pretrain_inputs(config), _fresh_tables(config)
    start_dir = run_directory(config, "start")
    with write_directory(start_dir, kind="start", inputs=inputs, config=config.model_dump()) as draft:
        save_tensors(fresh, draft.path("tables.safetensors"))
    start = Start(artifacts.absolute(start_dir), "start")
    tables = fresh | _train(config, "pretrain", pretrain_stages(config), inputs, make_validation, start)
    _forget_run(config, "start")
    return _write_model(config, "pretrained", "interactions", tables, inputs, "pretrain")


def fit_finetuned(config: Config, make_validation: MakeValidation) -> Manifest:
    """Recommendation-oriented finetuning of the collaborative tables: the `model/` that is scored and served."""
    inputs = finetune_inputs(config)
    start = Start(artifacts.absolute(config.directory("pretrained")), "pretrained")
    trained = _train(config, "finetune", finetune_stages(config), inputs, make_validation, start)
    if finetune_inputs(config) != inputs:
        raise ArtifactError(f"{start.directory} changed while finetune was at work; run the same command again")
    tables = start.tables() | trained
    prompt: Prompt = "recommendation" if config.finetune.epochs else "interactions"
    return _write_model(config, "model", prompt, tables, inputs, "finetune")


def _train(
    config: Config,
    name: str,
    stages: list[Stage],
    inputs: dict[str, str],
    make_validation: MakeValidation,
    start: Start | None = None,
) -> dict[str, Tensor]:
    if not any(stage.epochs for stage in stages):
        return {}
    backbone_dir, frozen = config.directory("backbone"), name != "backbone"
    before = load_backbone(backbone_dir, config.model.max_tokens).digest() if frozen else None
    job = Job(
        prepared_dir=artifacts.absolute(config.directory("prepared")),
        backbone_dir=artifacts.absolute(backbone_dir) if frozen else None,
        start=start,
        model=config.model,
        stages=stages,
        settings=run_settings(config),
        make_validation=make_validation,
        fingerprint=digest_of(inputs),
        tensorboard=config.training.tensorboard,
    )
    weights = fit(job, config.cluster, run_directory(config, name))
    if frozen and load_backbone(backbone_dir, config.model.max_tokens).digest() != before:
        raise ArtifactError(
            f"the frozen backbone in {backbone_dir} changed during {name}; run the backbone stage with --force"
        )
    return weights


def _fresh_tables(config: Config) -> dict[str, Tensor]:
    """The tables before any training: what pretraining begins from, and a stage of 0 epochs leaves."""
    prepared_dir = config.directory("prepared")
    _, tokens = load_space(prepared_dir)
    backbone = load_backbone(config.directory("backbone"), config.model.max_tokens)
    return fresh_tables(config, backbone, tokens, lambda: documents_by_bucket(prepared_dir))


def _write_model(
    config: Config, kind: str, prompt: Prompt, tables: dict[str, Tensor], inputs: dict[str, str], run_name: str
) -> Manifest:
    prepared_dir, directory = config.directory("prepared"), config.directory(kind)
    language, tokens = load_space(prepared_dir)
    facts = ModelFacts(
        num_words=language.num_words,
        num_users=tokens.num_users,
        num_items=tokens.num_items,
        width=tables["content_items"].shape[1],
        max_tokens=config.model.max_tokens,
        prompt=prompt,
        bf16=config.training.bf16,
        temperature=config.model.temperature,
    )
    with write_directory(directory, kind=kind, inputs=inputs, config=config.model_dump()) as draft:
        write_model(draft, tables, facts, prepared_dir=prepared_dir, backbone_dir=config.directory("backbone"))
        _copy_metrics(config, run_name, draft.uri)
    _forget_run(config, run_name)
    return read_manifest(directory, kind)


def run_directory(config: Config, name: str) -> str:
    """Where a running stage keeps its metrics and checkpoints until it is done."""
    return artifacts.join(config.directory("runs"), name)


def _copy_metrics(config: Config, name: str, directory: str) -> None:
    source = artifacts.join(run_directory(config, name), METRICS)
    if artifacts.exists(source):
        artifacts.copy_file(source, artifacts.join(directory, METRICS))


def _forget_run(config: Config, name: str) -> None:
    artifacts.remove_directory(run_directory(config, name))


def _training_digest(config: Config, stages: list[Stage]) -> str:
    """What a result depends on. The number of workers is left out: a run may go on with other hardware."""
    settings: dict[str, Any] = dataclasses.asdict(run_settings(config))
    del settings["checkpoint_every_epochs"], settings["accumulation"]
    return digest_of(
        {
            "stages": [dataclasses.asdict(stage) for stage in stages],
            "settings": settings,
            "global_batch_tokens": config.training.global_batch_tokens,
            "table_std": config.model.table_std,
            "table_start": config.model.table_start,
            "temperature": config.model.temperature,
        }
    )
