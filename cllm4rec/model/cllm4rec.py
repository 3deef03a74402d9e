"""CLLM4Rec: four ID tables around one frozen language model, with tied heads (Zhu et al. 2024; docs/method.md).

Shapes: I users, J items, N words, K hidden size, D width of the ID tables (K without `model.id_width`), R rows × T columns
= S slots of a grid, P item predictions, W word predictions, U distinct users of a batch, M items of a sampled softmax.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.config import ModelConfig
from cllm4rec.errors import ConfigError
from cllm4rec.model.accelerate import accelerate
from cllm4rec.model.adapter import is_adapter
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.batch import TensorBatch, TensorGrid
from cllm4rec.model.divided import is_divided
from cllm4rec.model.losses import squared_distance, tied_cross_entropy
from cllm4rec.model.packing import USER_TABLES, Table

TABLES: dict[Table, str] = {table: table.name.lower() for table in Table if table is not Table.WORDS}
"""The names of the four ID tables in the model's parameters and in `tables.safetensors`."""

DENSE: dict[str, tuple[str, ...]] = {
    "input_projection": tuple(TABLES.values()),
    "query_projection": (TABLES[Table.COLLABORATIVE_ITEMS],),
    "query_bias": (TABLES[Table.COLLABORATIVE_ITEMS],),
}
"""Dense parameters beside the tables → the tables that they serve. They are trained whenever one of these tables is, and are
saved, loaded and resumed with the tables. A model has those that its config asks for."""

_PROJECTED_STEP = 64
"""Rows of a projection are padded to a multiple of this, so that products have few distinct shapes: a CPU caches one kernel
per shape."""


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
    input_projection: nn.Parameter | None
    """(K, D), from rows of the ID tables to input embeddings of the language model. None: rows are read as they are."""
    query_projection: nn.Parameter | None
    """(D, K), from hidden states to what the item head multiplies with its table."""
    query_bias: nn.Parameter | None
    """(D,), the query of an empty history. Only with `residual`."""

    def __init__(
        self,
        backbone: Backbone,
        token_space: TokenSpace,
        *,
        std: float | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        id_width: int | None = None,
        residual: bool = False,
    ) -> None:
        """Create tables with normally distributed values.

        std: the standard deviation of the embeddings that the language model reads, by default that of the word embeddings.
        temperature: the divisor of the item logits. The paper uses 1.
        id_width: the width D of the tables. None: K, without projections. Raises ConfigError if it is above K.
        residual: queries are the sum of the items that were read, plus a projection of the hidden state and a bias, both of
            which start at zero (`queries`).

        Without `residual`, both projections start as the same random orthonormal directions. They keep the lengths of rows, and
        the logits are those of a tied head over the projected rows. Narrow rows are drawn √(K / D) times larger, to have the
        length of a row of width K.

        z^l starts equal to z^c: with lambda_l = 0 this is the mode of the prior before any data is read (Eq. 3).
        """
        super().__init__()
        self.token_space, self.temperature = token_space, temperature
        hidden, width = backbone.width, backbone.width if id_width is None else id_width
        check_id_width(id_width, hidden)
        generator = torch.Generator().manual_seed(seed)
        spread = (backbone.word_std if std is None else std) * (hidden / width) ** 0.5
        for kind, num_rows in (("users", token_space.num_users), ("items", token_space.num_items)):
            # In place: user tables can take most of a process's memory. Zeros take none until they are written.
            collaborative, content = (torch.zeros(num_rows, width) for _ in range(2))
            if spread:
                collaborative.copy_(content.normal_(generator=generator).mul_(spread))
            setattr(self, f"collaborative_{kind}", nn.Parameter(collaborative))
            setattr(self, f"content_{kind}", nn.Parameter(content))
        self.residual = residual
        self.input_projection = self.query_projection = self.query_bias = None
        if id_width is not None:
            directions_KD = torch.zeros(hidden, width)
            if spread:
                directions_KD = torch.linalg.qr(torch.randn(hidden, width, generator=generator)).Q
            self.input_projection = nn.Parameter(directions_KD.contiguous())
            self.query_projection = nn.Parameter(directions_KD.T.contiguous())
        if residual:
            self.query_projection = nn.Parameter(torch.zeros(width, hidden))
            self.query_bias = nn.Parameter(torch.zeros(width))
        self.backbone = backbone
        self.precision = torch.float32
        """The precision of the backbone and of the heads."""

    def tables(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, name) for name in TABLES.values()}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The tables and the dense parameters beside them: all parameters but those of the backbone."""
        return {name: weight for name in (*TABLES.values(), *DENSE) if (weight := getattr(self, name)) is not None}

    @property
    def id_width(self) -> int:
        """The width D of the ID tables and of queries."""
        return self.collaborative_items.shape[1]

    def train_only(self, names: Iterable[str]) -> None:
        """Require gradients for exactly these and the dense parameters that serve them.

        names: of tables, `backbone` for all its weights, or `adapter` for those of its LoRA adapter.
        """
        wanted = set(names)
        wanted |= {name for name, tables in DENSE.items() if wanted & set(tables)}
        for name, weight in self.own_parameters().items():
            weight.requires_grad_(name in wanted)
        for name, weight in self.backbone.named_parameters():
            weight.requires_grad_("backbone" in wanted or ("adapter" in wanted and is_adapter(name)))

    def precisions(self, precision: torch.dtype) -> dict[str, torch.dtype]:
        """The precision of each parameter in training that computes in `precision`: frozen weights of the backbone have it."""
        base = {name: weight for name, weight in self.backbone.named_parameters() if not is_adapter(name)}
        is_frozen = not any(weight.requires_grad for weight in base.values())
        return {f"backbone.{name}": precision for name in base if is_frozen}

    def compute_in(self, precision: torch.dtype) -> None:
        """Run the backbone and the heads in bfloat16 or float32, with the fastest available layers (`accelerate`)."""
        self.precision = precision
        accelerate(self.backbone, precision)

    def forward(self, batch: TensorBatch, lambda_c: float, user_rows: Mapping[str, Tensor] | None = None) -> Losses:
        """The losses of a batch.

        user_rows: the rows `batch.distinct_users` of user tables by table name, (U, D) each. Tables that are not given are
        read from the model.
        """
        users = {**self._user_rows(batch), **(user_rows or {})}
        hidden_SK = self._hidden_states(batch, users)
        read = batch.read_items if self.residual else None
        queries_PD, sampled = self.queries(hidden_SK[batch.item_slots], read), batch.sampled
        if sampled is None:
            items = tied_cross_entropy(
                queries_PD, self.collaborative_items, batch.item_target_rows, batch.item_targets, self.precision
            )
        else:
            table_MD = self.collaborative_items.index_select(0, sampled.items_M)
            items = tied_cross_entropy(
                queries_PD, table_MD, batch.item_target_rows, sampled.targets_E, self.precision, sampled.bias_M
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

    def layer_states(self, batch: TensorBatch) -> tuple[Tensor, ...]:
        """The states of all slots of the first grid before the first layer and after each layer, (S, K) each
        (`Backbone.layer_states`)."""
        users = self._user_rows(batch)
        embeddings = tuple(self._embed(grid, users) for grid in batch.grids)
        with self._autocast(embeddings[0].device.type):
            return tuple(states.flatten(0, 1) for states in self.backbone.layer_states(embeddings, batch.grids))

    def _hidden_states(self, batch: TensorBatch, users: Mapping[str, Tensor]) -> Tensor:
        embeddings = tuple(self._embed(grid, users) for grid in batch.grids)
        if torch.is_grad_enabled() and is_divided(self.collaborative_items):
            # All workers gather the layers in the backward pass, also one whose batch has no trained embeddings.
            embeddings = tuple(vectors if vectors.requires_grad else vectors.requires_grad_() for vectors in embeddings)
        with self._autocast(embeddings[0].device.type):
            hidden_RTK: Tensor = self.backbone(embeddings, batch.grids)
        return hidden_RTK.flatten(0, 1)

    def _autocast(self, device: str) -> contextlib.AbstractContextManager[object]:
        is_converted = self.precision == self.backbone.dtype
        return contextlib.nullcontext() if is_converted else torch.autocast(device, dtype=self.precision)

    def queries(self, hidden_PK: Tensor, read: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The vectors that the item head multiplies with its table, (P, D): hidden states, projected to the width of the
        tables and divided by the temperature.

        read: with `residual`, the items that each prediction has read, as values and offsets. With n of them the query is
            Σ rows / √n + projection · hidden / K + bias: a pretrained model passes on little of a history (docs/method.md).
            Divided by K, a hidden state of K entries of order 1 moves the query by a step of Adam, not by K of them.

        Equal hidden states and items at any place give equal bits if P is the same.
        """
        if self.residual:
            hidden_PK = hidden_PK.float() / self.backbone.width
        query_PD = hidden_PK
        if self.query_projection is not None:
            padded = nn.functional.pad(hidden_PK, (0, 0, 0, -len(hidden_PK) % _PROJECTED_STEP))
            query_PD = nn.functional.linear(padded, self.query_projection.to(padded.dtype))[: len(hidden_PK)]
        if self.query_bias is not None:
            query_PD = query_PD + self.query_bias
        if read is not None:
            query_PD = query_PD + self.history_sums(*read)
        return query_PD if self.temperature == 1.0 else query_PD / self.temperature

    def history_sums(self, items: Tensor, offsets: Tensor) -> Tensor:
        """Σ rows / √n over the collaborative rows of each list of items, (P, D); zero for an empty list."""
        sums_PD = nn.functional.embedding_bag(items, self.collaborative_items, offsets[:-1], mode="sum")
        return sums_PD * offsets.diff().clamp_min(1).rsqrt()[:, None]

    def _user_rows(self, batch: TensorBatch) -> dict[str, Tensor]:
        """The rows of the user tables that the batch reads, (U, D) each."""
        names = [TABLES[table] for table in USER_TABLES]
        return {name: getattr(self, name).index_select(0, batch.distinct_users) for name in names}

    def _embed(self, grid: TensorGrid, users: Mapping[str, Tensor]) -> Tensor:
        """The embedding of each slot, (R, T, K). Slots of padding and of unknown users hold `backbone.unknown_K`."""
        slots, rows = grid.lookups[Table.WORDS]
        words = self.backbone.embed_words(rows)
        vectors_SK = self.backbone.unknown_K.to(words.dtype).repeat(grid.segment_RT.numel(), 1)
        vectors_SK = vectors_SK.index_copy(0, slots, words)
        if self.input_projection is None:
            vectors_SK = self._write_ids(vectors_SK, grid, users)
        else:
            # All slots, so that the shape of the product, and with it the bits of a slot, do not depend on the others.
            ids_SD = self._write_ids(vectors_SK.new_zeros(len(vectors_SK), self.id_width), grid, users)
            projected_SK = nn.functional.linear(ids_SD, self.input_projection.to(words.dtype))
            id_slots = torch.cat([grid.lookups[table][0] for table in TABLES])
            vectors_SK = vectors_SK.index_copy(0, id_slots, projected_SK.index_select(0, id_slots))
        return vectors_SK.view(*grid.segment_RT.shape, -1)

    def _write_ids(self, vectors_SD: Tensor, grid: TensorGrid, users: Mapping[str, Tensor]) -> Tensor:
        """The vectors with the rows of users and items in the slots of their tokens."""
        for table, name in TABLES.items():
            slots, rows = grid.lookups[table]
            if len(slots):
                table_rows = users[name] if name in users else getattr(self, name)
                vectors_SD = vectors_SD.index_copy(0, slots, table_rows.index_select(0, rows).to(vectors_SD.dtype))
        return vectors_SD


def new_model(config: ModelConfig, backbone: Backbone, token_space: TokenSpace, seed: int) -> CLLM4Rec:
    """An untrained model around a backbone, as the config describes it. Raises ConfigError if `id_width` does not fit."""
    return CLLM4Rec(
        backbone,
        token_space,
        std=config.table_std,
        seed=seed,
        temperature=config.temperature,
        id_width=config.id_width,
        residual=config.is_residual,
    )


def check_id_width(id_width: int | None, width: int) -> None:
    """Raise ConfigError if the tables would be wider than the language model."""
    if id_width is not None and id_width > width:
        raise ConfigError(
            f"model.id_width {id_width} is above the width {width} of the language model; use {width} or less, or null"
        )
