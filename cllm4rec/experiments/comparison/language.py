"""The language models of a comparison. A model that is trained on the texts of a split is shared by all method runs that
start from the same model.

Shapes: D texts, K hidden size, S slots of a batch.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged, chunks
from cllm4rec.config import BackboneSize, Config
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.data.prepared import load_documents, load_token_space
from cllm4rec.model.adapter import add_adapter
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.backbone_files import load_backbone, new_backbone, save_trained
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.packing import Packer
from cllm4rec.staleness import settings_digest
from cllm4rec.storage.artifacts import read_manifest, write_directory
from cllm4rec.storage.files import digest_of, join, read_bytes
from cllm4rec.training.local_trainer import single_process
from cllm4rec.training.loop import Shard, train
from cllm4rec.training.phases import backbone_phases
from cllm4rec.training.shares import whole

_TEXTS_AT_ONCE = 32


def backbone_directory(config: Config) -> str:
    """The directory name contains a digest of all settings of the language model, so that equal models share a directory."""
    size = config.model.backbone
    size_name = f"{size.architecture}_{size.layers}x{size.width}" if isinstance(size, BackboneSize) else "stock"
    return config.run.directory(f"backbone_{size_name}_{digest_of(_backbone_settings(config))[:8]}")


def _backbone_settings(config: Config) -> dict[str, Any]:
    return {
        "model": config.model.model_dump(exclude={"table_std", "table_init", "temperature", "id_width"}),
        "stage": config.backbone.model_dump(),
        "training": settings_digest(single_process(config), "backbone"),
    }


def starting_backbone(config: Config, num_words: int) -> Backbone:
    """The language model that training of the tables starts from: trained on texts if `backbone.epochs` > 0, else as built.

    An adapter stays beside the weights if later stages train it.
    """
    adapter = config.backbone.adapter
    if config.backbone.epochs:
        is_final = adapter is None or set(adapter.trained_in) == {"backbone"}
        return load_backbone(backbone_directory(config), config.model.max_tokens, merge=is_final)
    return _new_backbone(config, num_words)


def _new_backbone(config: Config, num_words: int) -> Backbone:
    """The untrained language model, with its untrained adapter if the config has one."""
    backbone = new_backbone(config.model, num_words, config.seed)
    if config.backbone.adapter is not None:
        add_adapter(backbone, config.backbone.adapter, config.seed)
    return backbone


def backbone_inputs(config: Config) -> dict[str, str]:
    prepared = read_manifest(config.run.prepared, "prepared").digest
    return {"prepared": prepared, "settings": digest_of(_backbone_settings(config))}


def run_backbone(config: Config) -> str:
    """Train the language model on the training texts of one split and write it; returns its directory."""
    torch.set_num_threads(1)
    inputs, prepared_dir, started = backbone_inputs(config), config.run.prepared, time.monotonic()
    prompt_tokens, token_space = load_token_space(prepared_dir)
    shard = Shard(load_documents(prepared_dir), None)
    weights = train(
        lambda: CLLM4Rec(_new_backbone(config, prompt_tokens.num_words), token_space, std=0.0),
        prompt_tokens.prompts,
        backbone_phases(config),
        shard,
        single_process(config),
        log=lambda entry: None,
    )
    directory = backbone_directory(config)
    with write_directory(directory, kind="backbone", inputs=inputs, config=config.model_dump(mode="json")) as draft:
        trained = {name.removeprefix("backbone."): whole(weight) for name, weight in weights.items()}
        save_trained(config, prompt_tokens.num_words, trained, draft.uri)
        draft.counts["seconds"] = time.monotonic() - started
    return directory


def text_vectors(
    texts: list[str], backbone: Backbone, token_space: TokenSpace, config: Config
) -> npt.NDArray[np.float32]:
    """Mean hidden state of the first tokens of each text (D×K); zeros for empty texts."""
    tokenizer = tokenizers.Tokenizer.from_buffer(read_bytes(join(config.run.prepared, "tokenizer", "tokenizer.json")))
    model = CLLM4Rec(backbone, token_space, std=0.0).eval()
    max_tokens = config.data.max_text_tokens
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    words = Ragged.from_lists([encoding.ids[:max_tokens] for encoding in encoded], np.int32)
    vectors_DK = np.zeros((len(texts), backbone.width), np.float32)
    packer = Packer(token_space, _TEXTS_AT_ONCE * max_tokens, max_tokens)
    for rows in chunks(len(texts), _TEXTS_AT_ONCE):
        rows = rows[words.lengths[rows] > 0]
        part = words.take(rows)
        none = np.full(len(rows), -1, np.int64)
        kinds = np.full(len(rows), int(Kind.ITEM_TEXT), np.int8)
        # As prompts: the words of a main text would be predicted, too, without need.
        documents = Documents(kinds, none, none, part, Ragged.empty(len(rows)), Ragged.empty(len(rows)))
        batch = packer.layout(documents)
        with torch.inference_mode():
            hidden_SK = model.hidden_states(batch_to_device(batch, torch.device("cpu")))
        for row, first, end in zip(rows.tolist(), part.offsets[:-1], part.offsets[1:], strict=True):
            vectors_DK[row] = hidden_SK[first:end].float().mean(dim=0).numpy()
    return vectors_DK
