"""The phases of training as data: what is trained, on which documents, for how long, and how the best epoch is chosen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

from cllm4rec.config import Config
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind
from cllm4rec.training.epochs import DocumentSource, EpochBuilder
from cllm4rec.training.schedule import fixed

COLLABORATIVE = ("collaborative_users", "collaborative_items")
CONTENT = ("content_users", "content_items")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of training with its own optimizer.

    trained: the parameters that are trained: names of tables, `backbone`, or `adapter` for its LoRA adapter. The dense
    parameters that serve these tables are trained with them (`CLLM4Rec.train_only`).
    reads: the documents of an epoch. `plain_texts` are texts whose prompts have no IDs.
    validate: the prompt that ranks the validation items after each epoch, or None for no validation. With validation, the
    best epoch is kept, and `patience` epochs without a better one end the phase. Without it, the last epoch is kept.
    alternate: each step trains either the collaborative or the content tables, on the documents that read them.
    collaborative_from_content: set z^l to z^c at the start.
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
        """The kinds of the stored documents that the phase reads."""
        texts = any(name in ("texts", "plain_texts") for name in self.reads)
        interactions = any(name in ("interactions", "recommendations") for name in self.reads)
        return {*(TEXT_KINDS if texts else ()), *((Kind.INTERACTIONS,) if interactions else ())}

    def streams(
        self, builder: EpochBuilder, documents: Documents, epoch: int
    ) -> list[tuple[Iterator[Documents], tuple[str, ...]]]:
        """The documents of an epoch in order, in chunks, and the parameters that they train.

        One stream, or with `alternate` one stream per entry of `reads`.
        """
        sources = {name: self._source(name, builder, documents, epoch) for name in self.reads}
        if not self.alternate:
            return [(builder.iter_documents(documents, list(sources.values()), epoch), self.trained)]
        adapter = tuple(name for name in self.trained if name == "adapter")
        return [
            (
                builder.iter_documents(documents, [source], epoch),
                (CONTENT if name == "texts" else COLLABORATIVE) + adapter,
            )
            for name, source in sources.items()
        ]

    def _source(self, name: str, builder: EpochBuilder, documents: Documents, epoch: int) -> DocumentSource:
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
    """The language model or its adapter, trained on the texts of the training split without IDs."""
    phase = config.backbone
    trained = "backbone" if phase.adapter is None else "adapter"
    epochs = phase.epochs if phase.adapter is None or phase.trains_adapter("backbone") else 0
    return [Phase("backbone", (trained,), ("plain_texts",), epochs, phase.learning_rate)]


def _adapter(config: Config, stage: str) -> tuple[str, ...]:
    return ("adapter",) if config.backbone.trains_adapter(stage) else ()


def pretrain_phases(config: Config) -> list[Phase]:
    """Content warm-up, then mutually regularized pretraining (docs/method.md, "How it works", 4 and 5)."""
    phase = config.pretrain
    return [
        Phase(
            "warmup",
            CONTENT,
            ("texts",),
            phase.warmup_epochs if fixed(phase.text_fraction) else 0,
            phase.learning_rate,
            text_fraction=fixed(phase.text_fraction),
        ),
        Phase(
            "pretrain",
            COLLABORATIVE + CONTENT + _adapter(config, "pretrain"),
            ("interactions", "texts"),
            fixed(phase.epochs),
            phase.learning_rate,
            lambda_c=phase.lambda_c,
            validate="interactions",
            patience=phase.patience,
            alternate=phase.alternate,
            reorder_items=phase.reorder_items,
            user_dropout=phase.user_dropout,
            text_fraction=fixed(phase.text_fraction),
            collaborative_from_content=True,
        ),
    ]


def finetune_phases(config: Config) -> list[Phase]:
    """Recommendation-oriented finetuning of z^l with z^c frozen (docs/method.md, "How it works", 6)."""
    phase = config.finetune
    return [
        Phase(
            "finetune",
            COLLABORATIVE + _adapter(config, "finetune"),
            ("recommendations",),
            fixed(phase.epochs),
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
    """Text documents without the IDs in their prompts, for training the language model alone."""
    return dataclasses.replace(texts, prompt=texts.prompt.where(builder.token_space.is_word(texts.prompt.values)))
