"""Directories as the stages leave them, written in a moment: the parity world prepared, and models nobody trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import torch

from cllm4rec.config import BackboneSize
from cllm4rec.data.documents import Prompts
from cllm4rec.data.prepared import PromptTokens, bucket_name, bucket_of
from cllm4rec.data.world import ParityWorld, parity_world
from cllm4rec.model.backbone_files import save_backbone
from cllm4rec.model.built_backbone import build_backbone
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.saved_model import ModelMetadata, save_pretrained
from cllm4rec.storage.artifacts import read_manifest, write_directory
from cllm4rec.storage.files import write_table

NUM_WORDS, MAX_TOKENS, WIDTH = 300, 64, 32


def write_prepared(
    folder: Path, num_buckets: int = 1, world: ParityWorld | None = None, inputs: Mapping[str, str] | None = None
) -> str:
    world = world or parity_world()
    with write_directory(str(folder), kind="prepared", inputs=inputs or {}, config={}) as draft:
        world.catalog.save(draft.uri)
        draft.counts["users"] = world.num_users
        PromptTokens(Prompts.tokenize(lambda text: [len(text), len(text) + 1]), NUM_WORDS).save(draft.uri)
        splits = {name: getattr(world.histories, name).to_arrow() for name in ("train", "validation", "test")}
        rows = pa.table({"user": world.histories.user, "user_id": list(world.catalog.user_ids), **splits})
        bucket_B = bucket_of(world.histories.user, world.num_users, num_buckets)
        for bucket in range(num_buckets):
            write_table(rows.filter(pa.array(bucket_B == bucket)), draft.path("histories", bucket_name(bucket)))
    return str(folder)


def write_random_model(
    folder: Path,
    prepared_dir: str,
    seed: int,
    world: ParityWorld | None = None,
    bf16: bool = False,
    id_width: int | None = None,
) -> str:
    """A model nobody trained: what it answers is arbitrary, but the same wherever it is asked."""
    world = world or parity_world()
    backbone = build_backbone(BackboneSize(width=WIDTH, heads=2, vocab_size=NUM_WORDS), NUM_WORDS, MAX_TOKENS, seed)
    with write_directory(str(folder / "backbone"), kind="backbone", inputs={}, config={}) as draft:
        save_backbone(backbone, draft.uri)
    torch.manual_seed(seed)
    model = CLLM4Rec(backbone, world.catalog.token_space(NUM_WORDS), std=1.0, id_width=id_width)
    facts = ModelMetadata(
        NUM_WORDS,
        world.num_users,
        world.num_items,
        model.id_width,
        MAX_TOKENS,
        prompt="recommendation",
        bf16=bf16,
        id_width=id_width,
    )
    inputs = {"prepared": read_manifest(prepared_dir, "prepared").digest}
    with write_directory(str(folder / "model"), kind="model", inputs=inputs, config={}) as draft:
        tables = {name: weight.data for name, weight in model.own_parameters().items()}
        save_pretrained(draft, tables, facts, prepared_dir=prepared_dir, backbone_dir=str(folder / "backbone"))
    return str(folder / "model")
