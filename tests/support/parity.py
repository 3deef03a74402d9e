"""The parity world (style.md), ready to train on without Ray or a tokenizer: what most tests of the model use.

Even users like even items and odd users odd ones; each user hides one liked item in test and one in validation.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import Adapter, BackboneSize, Config, parse_config
from cllm4rec.data.documents import Documents, Prompts
from cllm4rec.data.world import ParityWorld, parity_world
from cllm4rec.metrics.protocol import Validation
from cllm4rec.model.adapter import add_adapter
from cllm4rec.model.built_backbone import build_backbone
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.ranker import Ranker
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.training import loop
from cllm4rec.training.epochs import EpochBuilder
from cllm4rec.training.loop import Shard, load_parameters
from cllm4rec.training.phases import COLLABORATIVE, CONTENT, Phase

ARCHITECTURES = ("gpt2", "llama", "t5")
MAX_TOKENS = 48
NARROW = 8
"""An `id_width` of a quarter of the width of the language model."""


@dataclasses.dataclass(frozen=True)
class Parity:
    world: ParityWorld
    prompts: Prompts
    token_space: TokenSpace
    documents: Documents

    def make_model(
        self, architecture: str = "gpt2", id_width: int | None = None, residual: bool = False, adapter: bool = False
    ) -> CLLM4Rec:
        size = BackboneSize(architecture=architecture, layers=2, width=32, heads=4, vocab_size=257)  # type: ignore[arg-type]
        # A random backbone passes little of a history on: rows that start small are outgrown by what they learn.
        std = 0.3 if architecture == "t5" else 0.1
        backbone = build_backbone(size, self.token_space.num_words, 2 * MAX_TOKENS, seed=0)
        if adapter:
            add_adapter(backbone, Adapter(rank=2), seed=0)
        return CLLM4Rec(backbone, self.token_space, std=std, id_width=id_width, residual=residual)

    def shard(self) -> Shard:
        return Shard(self.documents, Validation(self.world.histories))


@cache
def parity() -> Parity:
    world = parity_world()
    vocabulary: dict[str, int] = {}

    def encode(text: str) -> list[int]:
        return [vocabulary.setdefault(word, len(vocabulary)) for word in text.replace(",", " ,").split()]

    prompts = Prompts.tokenize(encode)
    user, item, texts = world.reviews()
    reviews = Ragged.from_lists([encode(text) for text in texts])
    biographies = Ragged.from_lists([encode(text) for text in world.catalog.user_texts])
    contents = Ragged.from_lists([encode(text) for text in world.catalog.item_texts])
    token_space = TokenSpace(len(vocabulary), world.num_users, world.num_items)
    documents = Documents.concat(
        [
            prompts.interactions(token_space, world.histories.user, world.histories.train),
            prompts.reviews(token_space, user, item, reviews),
            prompts.user_texts(token_space, world.histories.user, biographies),
            prompts.item_texts(token_space, np.arange(world.num_items), contents),
        ]
    )
    return Parity(world, prompts, token_space, documents.in_order())


def parity_frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The parity world as tables of interactions with reviews, and of items with texts."""
    world = parity_world()
    user, item, text = world.reviews()
    catalog = world.catalog
    interactions = pd.DataFrame({"user": catalog.user_ids[user], "item": catalog.item_ids[item], "text": text})
    items = pd.DataFrame({"item": catalog.item_ids, "text": catalog.item_texts})
    return interactions, items


def all_kinds(user_dropout: float = 0.3) -> Documents:
    """An epoch of every kind of document, in its order."""
    reads = ("interactions", "texts", "recommendations")
    phase = Phase("any", (), reads, 1, 0.0, user_dropout=user_dropout, mask_range=(0.3, 0.3))
    builder = EpochBuilder(parity().prompts, parity().token_space, MAX_TOKENS, seed=0)
    ((stream, _),) = phase.streams(builder, parity().documents, 0)
    return Documents.concat(list(stream))


def settings(accumulation: int = 1, num_workers: int = 1, seed: int = 0, **training: Any) -> Config:
    """The config of a small run, on plain torch in float32; only what the loop reads of it matters."""
    training = {"engine": "torch", "bf16": False, "micro_batch_tokens": 8 * MAX_TOKENS} | training
    global_batch_tokens = training["micro_batch_tokens"] * accumulation * num_workers
    return parse_config(
        {
            "output_dir": "unused",
            "seed": seed,
            "data": {"interactions": {"path": "unused"}, "max_text_tokens": 16},
            "model": {"max_tokens": MAX_TOKENS, "backbone": {"layers": 1, "width": 32, "heads": 2, "vocab_size": 300}},
            "training": training | {"global_batch_tokens": global_batch_tokens},
            "cluster": {"num_workers": num_workers, "threads_per_worker": 1},
        }
    )


def phases(epochs: int = 20) -> list[Phase]:
    """A short form of the real three: warm-up, mutual pretraining, finetuning."""
    return [
        Phase("warmup", CONTENT, ("texts",), 1, 1e-2),
        Phase(
            "pretrain", COLLABORATIVE + CONTENT, ("interactions", "texts"), 2, 1e-2, 1.0, "interactions", patience=9,
            collaborative_from_content=True,
        ),
        Phase(
            "finetune", COLLABORATIVE, ("recommendations",), epochs, 3e-2, 0.0, "recommendation", patience=epochs,
            user_dropout=0.5, mask_range=(0.1, 0.9), all_targets=True,
        ),
    ]  # fmt: skip


@cache
def trained(architecture: str = "gpt2", id_width: int | None = None) -> Ranker:
    """A ranker trained through all stages, on one thread so that it is the same everywhere."""
    world = parity()
    torch.set_num_threads(1)
    weights = loop.train(
        lambda: world.make_model(architecture, id_width),
        world.prompts,
        phases(),
        world.shard(),
        settings(),
        log=lambda _: None,
    )
    model = world.make_model(architecture, id_width)
    load_parameters(model, weights)
    return Ranker(model.eval(), world.prompts, MAX_TOKENS)


def scorer(architecture: str = "gpt2") -> Scorer:
    return Scorer(trained(architecture), parity().world.catalog, "parity")


def recall_at_1(ranker: Ranker, users: np.ndarray[Any, Any] | None = None) -> float:
    """Share of users whose hidden test item comes first."""
    histories = parity().world.histories
    known = histories.together("train", "validation")
    items, _ = Scorer(ranker, parity().world.catalog, "").top_k(histories.user if users is None else users, known, 1)
    return float((items[:, 0] == histories.test.values).mean())


def train(some_stages, shard=None, id_width=None, **changes):
    """Weights and log of a run on one thread."""
    torch.set_num_threads(1)
    world, log = parity(), []
    options = {name: changes.pop(name) for name in ("save", "resumed") if name in changes}
    weights = loop.train(
        lambda: world.make_model(id_width=id_width),
        world.prompts,
        some_stages,
        shard or world.shard(),
        settings(**changes),
        log=log.append,
        **options,
    )
    return weights, log
