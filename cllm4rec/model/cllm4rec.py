"""CLLM4Rec: four ID tables around one frozen language model, with tied heads (Zhu et al. 2024; docs/method.md).

Shapes: I users, J items, N words, K hidden size, R rows × T columns = S slots of a grid, P item predictions, W word
predictions, U distinct users of a batch, M items of a sampled softmax.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.config import ModelConfig
from cllm4rec.model.accelerate import accelerate
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.batch import TensorBatch, TensorGrid
from cllm4rec.model.losses import squared_distance, tied_cross_entropy
from cllm4rec.model.packing import USER_TABLES, Table

TABLES: dict[Table, str] = {table: table.name.lower() for table in Table if table is not Table.WORDS}
"""The names of the four ID tables in the model's parameters and in `tables.safetensors`."""


class Losses(NamedTuple):
    """Sums over the documents of a batch, each of shape (). `total` = items + words + (lambda_c / 2) · penalty."""

    total: Tensor
    items: Tensor
    words: Tensor
    penalty: Tensor


class CLLM4Rec(nn.Module):
    """The joint model. Its `forward` returns the negative log posterior of a batch (Eq. 7, 8, 9 and 10 in one pass)."""

    collaborative_users: nn.Parameter
    collaborative_items: nn.Parameter
    content_users: nn.Parameter
    content_items: nn.Parameter

    def __init__(
        self,
        backbone: Backbone,
        token_space: TokenSpace,
        *,
        std: float | None = None,
        seed: int = 0,
        temperature: float = 1.0,
    ) -> None:
        """Create tables with normally distributed values.

        std: the standard deviation, by default that of the word embeddings.
        temperature: the divisor of the item logits. The paper uses 1.

        z^l starts equal to z^c: with lambda_l = 0 this is the mode of the prior before any data is read (Eq. 3).
        """
        super().__init__()
        self.token_space, self.temperature = token_space, temperature
        generator = torch.Generator().manual_seed(seed)
        spread = backbone.word_std if std is None else std
        for kind, num_rows in (("users", token_space.num_users), ("items", token_space.num_items)):
            # In place: user tables can take most of a process's memory. Zeros take none until they are written.
            collaborative, content = (torch.zeros(num_rows, backbone.width) for _ in range(2))
            if spread:
                collaborative.copy_(content.normal_(generator=generator).mul_(spread))
            setattr(self, f"collaborative_{kind}", nn.Parameter(collaborative))
            setattr(self, f"content_{kind}", nn.Parameter(content))
        self.backbone = backbone
        self.precision = torch.float32
        """The precision of the backbone and of the heads."""

    def tables(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, name) for name in TABLES.values()}

    def train_only(self, names: Iterable[str]) -> None:
        """Require gradients for exactly these: names of tables, or `backbone`."""
        wanted = set(names)
        for name, table in self.tables().items():
            table.requires_grad_(name in wanted)
        self.backbone.requires_grad_("backbone" in wanted)

    def compute_in(self, precision: torch.dtype) -> None:
        """Run the backbone and the heads in bfloat16 or float32, with the fastest available layers (`accelerate`)."""
        self.precision = precision
        accelerate(self.backbone, precision)

    def forward(self, batch: TensorBatch, lambda_c: float, user_rows: Mapping[str, Tensor] | None = None) -> Losses:
        """The losses of a batch.

        user_rows: the rows `batch.distinct_users` of user tables by table name, (U, K) each. Tables that are not given are
        read from the model.
        """
        users = {**self._user_rows(batch), **(user_rows or {})}
        hidden_SK = self._hidden_states(batch, users)
        queries_PK, sampled = self.queries(hidden_SK[batch.item_slots]), batch.sampled
        if sampled is None:
            items = tied_cross_entropy(
                queries_PK, self.collaborative_items, batch.item_target_rows, batch.item_targets, self.precision
            )
        else:
            table_MK = self.collaborative_items.index_select(0, sampled.items_M)
            items = tied_cross_entropy(
                queries_PK, table_MK, batch.item_target_rows, sampled.targets_E, self.precision, sampled.bias_M
            )
        head, num_words, hidden_WK = self.backbone.word_head, self.token_space.num_words, hidden_SK[batch.word_slots]
        words = tied_cross_entropy(
            hidden_WK if head.scale == 1.0 else hidden_WK * head.scale,
            head.table_NK[:num_words],
            torch.arange(len(batch.word_slots), device=batch.word_slots.device),
            batch.word_targets,
            self.precision,
            offset_J=None if head.bias_N is None else head.bias_N[:num_words],
            softcap=head.softcap,
        )
        penalty = squared_distance(
            users["collaborative_users"], users["content_users"], batch.distinct_user_counts
        ) + squared_distance(
            self.collaborative_items.index_select(0, batch.distinct_items),
            self.content_items.index_select(0, batch.distinct_items),
            batch.distinct_item_counts,
        )
        return Losses(items + words + 0.5 * lambda_c * penalty, items, words, penalty)

    def hidden_states(self, batch: TensorBatch) -> Tensor:
        """The hidden states of all slots of the last grid, (S, K), in the precision of the backbone."""
        return self._hidden_states(batch, self._user_rows(batch))

    def _hidden_states(self, batch: TensorBatch, users: Mapping[str, Tensor]) -> Tensor:
        embeddings = tuple(self._embed(grid, users) for grid in batch.grids)
        is_converted = self.precision == self.backbone.dtype
        device = embeddings[0].device.type
        with contextlib.nullcontext() if is_converted else torch.autocast(device, dtype=self.precision):
            hidden_RTK: Tensor = self.backbone(embeddings, batch.grids)
        return hidden_RTK.flatten(0, 1)

    def queries(self, hidden_PK: Tensor) -> Tensor:
        """The vectors that the item head multiplies with its table: hidden states divided by the temperature."""
        return hidden_PK if self.temperature == 1.0 else hidden_PK / self.temperature

    def _user_rows(self, batch: TensorBatch) -> dict[str, Tensor]:
        """The rows of the user tables that the batch reads, (U, K) each."""
        names = [TABLES[table] for table in USER_TABLES]
        return {name: getattr(self, name).index_select(0, batch.distinct_users) for name in names}

    def _embed(self, grid: TensorGrid, users: Mapping[str, Tensor]) -> Tensor:
        """The embedding of each slot, (R, T, K). Slots of padding and of unknown users hold `backbone.unknown_K`."""
        slots, rows = grid.lookups[Table.WORDS]
        words = self.backbone.embed_words(rows)
        vectors_SK = self.backbone.unknown_K.to(words.dtype).repeat(grid.segment_RT.numel(), 1)
        vectors_SK = vectors_SK.index_copy(0, slots, words)
        for table, name in TABLES.items():
            slots, rows = grid.lookups[table]
            if len(slots):
                table_rows = users[name] if name in users else getattr(self, name)
                vectors_SK = vectors_SK.index_copy(0, slots, table_rows.index_select(0, rows).to(words.dtype))
        return vectors_SK.view(*grid.segment_RT.shape, -1)


def new_model(config: ModelConfig, backbone: Backbone, token_space: TokenSpace, seed: int) -> CLLM4Rec:
    """An untrained model around a backbone, as the config describes it."""
    return CLLM4Rec(backbone, token_space, std=config.table_std, seed=seed, temperature=config.temperature)
