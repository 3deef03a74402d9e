"""The stages of training as data: what is trained, on which documents, for how long, and what says which epoch was best."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

from cllm4rec.config import Config
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind
from cllm4rec.training.epochs import DocumentSource, EpochBuilder

COLLABORATIVE = ("collaborative_users", "collaborative_items")
CONTENT = ("content_users", "content_items")


@dataclasses.dataclass(frozen=True)
class Phase:
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
        self, builder: EpochBuilder, documents: Documents, epoch: int
    ) -> list[tuple[Iterator[Documents], tuple[str, ...]]]:
        """An epoch's documents in order, some at a time, and what they train: one stream, or with `alternate` one a kind."""
        parts = {name: self._part(name, builder, documents, epoch) for name in self.reads}
        if not self.alternate:
            return [(builder.iter_documents(documents, list(parts.values()), epoch), self.trained)]
        return [
            (builder.iter_documents(documents, [part], epoch), CONTENT if name == "texts" else COLLABORATIVE)
            for name, part in parts.items()
        ]

    def _part(self, name: str, builder: EpochBuilder, documents: Documents, epoch: int) -> DocumentSource:
        if name in ("texts", "plain_texts"):
            rows = builder.text_rows(documents, epoch, self.text_fraction)
            return DocumentSource(rows, lambda texts: without_ids(texts, builder) if name == "plain_texts" else texts)
        if name == "interactions":
            make = functools.partial(
                builder.interactions, epoch=epoch, reorder=self.reorder_items, user_dropout=self.user_dropout
            )
            return DocumentSource(documents.rows_of([Kind.INTERACTIONS]), make)
        make = functools.partial(
            builder.recommendations,
            epoch=epoch,
            mask_range=self.mask_range,
            all_targets=self.all_targets,
            user_dropout=self.user_dropout,
        )
        return DocumentSource(documents.rows_of([Kind.INTERACTIONS]), make, Kind.RECOMMENDATION)


def backbone_phases(config: Config) -> list[Phase]:
    """The language model itself on the training split's texts, no ID in sight."""
    phase = config.backbone
    return [Phase("backbone", ("backbone",), ("plain_texts",), phase.epochs, phase.learning_rate)]


def pretrain_phases(config: Config) -> list[Phase]:
    """Content warm-up, then mutually regularized pretraining (method.md, Training 1 and 2)."""
    phase = config.pretrain
    return [
        Phase(
            "warmup", CONTENT, ("texts",), phase.warmup_epochs, phase.learning_rate, text_fraction=phase.text_fraction
        ),
        Phase(
            "pretrain",
            COLLABORATIVE + CONTENT,
            ("interactions", "texts"),
            phase.epochs,
            phase.learning_rate,
            lambda_c=phase.lambda_c,
            validate="interactions",
            patience=phase.patience,
            alternate=phase.alternate,
            reorder_items=phase.reorder_items,
            user_dropout=phase.user_dropout,
            text_fraction=phase.text_fraction,
            collaborative_from_content=True,
        ),
    ]


def finetune_phases(config: Config) -> list[Phase]:
    """Recommendation-oriented finetuning of z^l, z^c held (method.md, Training 3)."""
    phase = config.finetune
    return [
        Phase(
            "finetune",
            COLLABORATIVE,
            ("recommendations",),
            phase.epochs,
            phase.learning_rate,
            lambda_c=phase.lambda_c,
            validate="recommendation",
            patience=phase.patience,
            user_dropout=phase.user_dropout,
            mask_range=phase.mask_range,
            all_targets=phase.target == "all",
        )
    ]


def without_ids(texts: Documents, builder: EpochBuilder) -> Documents:
    """Text documents whose prompts keep their words and lose their IDs: what a language model alone can learn from."""
    return dataclasses.replace(texts, prompt=texts.prompt.where(builder.token_space.is_word(texts.prompt.values)))
