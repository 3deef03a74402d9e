"""The stages of training as data: what is trained, on which documents, for how long, and what says which epoch was best."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

from cllm4rec.config import Config
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind
from cllm4rec.data.epochs import Maker, Part

COLLABORATIVE = ("collaborative_users", "collaborative_items")
CONTENT = ("content_users", "content_items")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stretch of training with one optimizer.

    reads: which documents an epoch has. validate: the prompt that ranks validation items after each epoch, or None
    where there is nothing to rank yet; the epoch with the best validation is kept, and `patience` epochs without a
    better one end the stage. Without validation the last epoch is kept.
    """

    name: str
    trained: tuple[str, ...]
    reads: tuple[Literal["interactions", "texts", "recommendations", "plain_texts"], ...]
    epochs: int
    learning_rate: float
    lambda_c: float = 0.0
    validate: Literal["interactions", "recommendation"] | None = None
    patience: int = 1
    alternate: bool = False
    reorder_items: bool = True
    user_dropout: float = 0.0
    text_fraction: float = 1.0
    mask_range: tuple[float, float] = (0.2, 0.2)
    all_targets: bool = False
    collaborative_from_content: bool = False

    @property
    def kinds(self) -> set[Kind]:
        """Of the documents that its epochs are made of."""
        texts = any(name in ("texts", "plain_texts") for name in self.reads)
        interactions = any(name in ("interactions", "recommendations") for name in self.reads)
        return {*(TEXT_KINDS if texts else ()), *((Kind.INTERACTIONS,) if interactions else ())}

    def streams(
        self, maker: Maker, documents: Documents, epoch: int
    ) -> list[tuple[Iterator[Documents], tuple[str, ...]]]:
        """An epoch's documents in order, some at a time, and what they train: one stream, or with `alternate` one a kind."""
        parts = {name: self._part(name, maker, documents, epoch) for name in self.reads}
        if not self.alternate:
            return [(maker.stream(documents, list(parts.values()), epoch), self.trained)]
        return [
            (maker.stream(documents, [part], epoch), CONTENT if name == "texts" else COLLABORATIVE)
            for name, part in parts.items()
        ]

    def _part(self, name: str, maker: Maker, documents: Documents, epoch: int) -> Part:
        if name in ("texts", "plain_texts"):
            rows = maker.text_rows(documents, epoch, self.text_fraction)
            return Part(rows, lambda texts: without_ids(texts, maker) if name == "plain_texts" else texts)
        if name == "interactions":
            make = functools.partial(
                maker.interactions, epoch=epoch, reorder=self.reorder_items, user_dropout=self.user_dropout
            )
            return Part(documents.rows_of([Kind.INTERACTIONS]), make)
        make = functools.partial(
            maker.recommendations,
            epoch=epoch,
            mask_range=self.mask_range,
            all_targets=self.all_targets,
            user_dropout=self.user_dropout,
        )
        return Part(documents.rows_of([Kind.INTERACTIONS]), make, Kind.RECOMMENDATION)


def backbone_stages(config: Config) -> list[Stage]:
    """The language model itself on the training split's texts, no ID in sight."""
    stage = config.backbone
    return [Stage("backbone", ("backbone",), ("plain_texts",), stage.epochs, stage.learning_rate)]


def pretrain_stages(config: Config) -> list[Stage]:
    """Content warm-up, then mutually regularised pretraining (method.md, Training 1 and 2)."""
    stage = config.pretrain
    return [
        Stage(
            "warmup", CONTENT, ("texts",), stage.warmup_epochs, stage.learning_rate, text_fraction=stage.text_fraction
        ),
        Stage(
            "pretrain",
            COLLABORATIVE + CONTENT,
            ("interactions", "texts"),
            stage.epochs,
            stage.learning_rate,
            lambda_c=stage.lambda_c,
            validate="interactions",
            patience=stage.patience,
            alternate=stage.alternate,
            reorder_items=stage.reorder_items,
            user_dropout=stage.user_dropout,
            text_fraction=stage.text_fraction,
            collaborative_from_content=True,
        ),
    ]


def finetune_stages(config: Config) -> list[Stage]:
    """Recommendation-oriented finetuning of z^l, z^c held (method.md, Training 3)."""
    stage = config.finetune
    return [
        Stage(
            "finetune",
            COLLABORATIVE,
            ("recommendations",),
            stage.epochs,
            stage.learning_rate,
            lambda_c=stage.lambda_c,
            validate="recommendation",
            patience=stage.patience,
            user_dropout=stage.user_dropout,
            mask_range=stage.mask_range,
            all_targets=stage.target == "all",
        )
    ]


def without_ids(texts: Documents, maker: Maker) -> Documents:
    """Text documents whose prompts keep their words and lose their IDs: what a language model alone can learn from."""
    return dataclasses.replace(texts, prompt=texts.prompt.where(maker.tokens.is_word(texts.prompt.values)))
