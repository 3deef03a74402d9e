"""Directories in the format of the stages, with random data of any size, for the ray_overhead and startup parts."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import ModelConfig
from cllm4rec.data.documents import Prompts
from cllm4rec.data.prepared import PromptTokens, bucket_name, bucket_of, num_buckets
from cllm4rec.model.backbone_files import new_backbone, save_backbone
from cllm4rec.model.cllm4rec import new_model
from cllm4rec.model.saved_model import ModelMetadata, save_pretrained
from cllm4rec.storage import files
from cllm4rec.storage.artifacts import read_manifest, write_directory
from cllm4rec.storage.files import write_table

_HISTORY = (5, 12)
"""Minimum and maximum number of items per user, as in the prepared sample world."""


def random_histories(num_users: int, num_items: int, seed: int) -> Histories:
    """Users with random items: there is nothing to learn, but the work is the same."""
    rng = np.random.default_rng(seed)
    low, high = _HISTORY
    lengths = rng.integers(low, high + 1, num_users)
    user_E = np.repeat(np.arange(num_users), lengths)
    train = Ragged.from_rows(rng.integers(num_items, size=len(user_E)), user_E, num_users).unique()
    held_out = [Ragged.from_rows(rng.integers(num_items, size=num_users), np.arange(num_users), num_users)] * 2
    return Histories(np.arange(num_users), train, *held_out)


def write_prepared(directory: str, histories: Histories, num_items: int, num_words: int) -> None:
    """Write a `prepared/` directory with these histories and their interaction documents, without texts."""
    num_users = len(histories.user)
    catalog = Catalog(
        [f"u{user:09d}" for user in range(num_users)],
        [f"i{item:09d}" for item in range(num_items)],
        item_counts=np.bincount(histories.train.values, minlength=num_items).tolist(),
    )
    prompts = Prompts.tokenize(lambda text: [len(text) % num_words, (len(text) + 1) % num_words])
    documents = prompts.interactions(catalog.token_space(num_words), histories.user, histories.train).to_arrow()
    splits = {name: getattr(histories, name).to_arrow() for name in ("train", "validation", "test")}
    rows = pa.table({"user": histories.user, "user_id": list(catalog.user_ids), **splits})
    bucket_B = bucket_of(histories.user, num_users, num_buckets(num_users))
    with write_directory(directory, kind="prepared", inputs={}, config={}) as draft:
        catalog.save(draft.uri)
        PromptTokens(prompts, num_words).save(draft.uri)
        for bucket in range(num_buckets(num_users)):
            chosen = pa.array(bucket_B == bucket)
            write_table(documents.filter(chosen), draft.path("documents", bucket_name(bucket)))
            write_table(rows.filter(chosen), draft.path("histories", bucket_name(bucket)))
        draft.counts |= {"users": num_users, "items": num_items}


def write_random_model(output_dir: str, model: ModelConfig, bf16: bool, seed: int) -> None:
    """Write an untrained `backbone/` and `model/` for the `prepared/` in the same folder."""
    prepared_dir, backbone_dir, model_dir = (files.join(output_dir, name) for name in ("prepared", "backbone", "model"))
    catalog, prompt_tokens = Catalog.load(prepared_dir), PromptTokens.load(prepared_dir)
    backbone = new_backbone(model, prompt_tokens.num_words, seed)
    with write_directory(backbone_dir, kind="backbone", inputs={}, config={}) as draft:
        save_backbone(backbone, draft.uri)
    untrained = new_model(model, backbone, catalog.token_space(prompt_tokens.num_words), seed)
    tables = {name: weight.data for name, weight in untrained.own_parameters().items()}
    metadata = ModelMetadata(
        num_words=prompt_tokens.num_words,
        num_users=catalog.num_users,
        num_items=catalog.num_items,
        width=untrained.id_width,
        max_tokens=model.max_tokens,
        prompt="recommendation",
        bf16=bf16,
        temperature=model.temperature,
        id_width=model.id_width,
    )
    inputs = {"prepared": read_manifest(prepared_dir, "prepared").digest}
    with write_directory(model_dir, kind="model", inputs=inputs, config={}) as draft:
        save_pretrained(draft, tables, metadata, prepared_dir=prepared_dir, backbone_dir=backbone_dir)


def empty_directory(directory: str) -> str:
    """Create a directory, or remove its content."""
    files.remove_directory(directory)
    os.makedirs(directory)
    return directory
