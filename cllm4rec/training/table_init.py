"""Item rows that begin from what was written of the items, so that training starts near its goal where texts tell items
apart: latent semantic analysis (Deerwester et al., "Indexing by Latent Semantic Analysis", JASIS 1990).

Shapes: J items, N words, R components, K width of the tables.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.sparse.linalg import svds
from torch import Tensor

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.config import Config
from cllm4rec.data.documents import TEXT_KINDS, Documents
from cllm4rec.data.tf_idf import tf_idf
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.cllm4rec import CLLM4Rec, new_model


def initial_tables(
    config: Config, backbone: Backbone, token_space: TokenSpace, read: Callable[[], Iterable[Documents]]
) -> dict[str, Tensor]:
    """The tables before any training, as `model.table_init` asks; `read` gives the training documents, part by part."""
    model = new_model(config.model, backbone, token_space, config.seed)
    if config.model.table_init == "texts":
        init_items_from_texts(model, read(), config.seed)
    return {name: table.data for name, table in model.tables().items()}


def init_items_from_texts(model: CLLM4Rec, parts: Iterable[Documents], seed: int) -> None:
    """Put `text_components` in the place of both tables' fresh item rows, at a mean square length of 1.

    An item without a text keeps its noise, and so do all where no text tells items apart.
    """
    count_JN = word_counts(parts, model.token_space.num_items, model.token_space.num_words)
    has_text_J = np.diff(count_JN.indptr) > 0
    rows_JK = text_components(count_JN, model.content_items.shape[1], seed)
    length = np.sqrt(np.square(rows_JK[has_text_J]).sum(axis=1).mean()) if has_text_J.any() else 0.0
    if length < _SAME:
        return
    chosen = torch.from_numpy(has_text_J)
    with torch.no_grad():
        for table in (model.content_items, model.collaborative_items):
            table[chosen] = torch.from_numpy(rows_JK[has_text_J] / length).to(table)


_SAME = 1e-6


def word_counts(parts: Iterable[Documents], num_items: int, num_words: int) -> sparse.csr_array:
    """J × N: how often each item's texts and reviews have each token. Grows with the catalog, not with the reviews."""
    total_JN = sparse.csr_array((num_items, num_words), dtype=np.float32)
    pending: list[sparse.csr_array] = []
    for documents in parts:
        about = documents.take(np.flatnonzero(np.isin(documents.kind, TEXT_KINDS) & (documents.item >= 0)))
        place = (np.repeat(about.item, about.main.lengths), about.main.values)
        ones = np.ones(len(about.main.values), np.float32)
        pending.append(sparse.coo_array((ones, place), shape=total_JN.shape).tocsr())
        # Adding copies the total, so it waits until there is as much to add.
        if sum(part.nnz for part in pending) > max(total_JN.nnz, _AT_ONCE):
            total_JN, pending = total_JN + functools.reduce(operator.add, pending), []
    return functools.reduce(operator.add, pending, total_JN)


_AT_ONCE = 1 << 20


def text_components(count_JN: sparse.csr_array, width: int, seed: int) -> npt.NDArray[np.float32]:
    """J × K: principal components of the TF-IDF of the items that have words, centered, and turned at random so that every
    dimension bears as much; the others are rows of zeros."""
    weight_JN, has_text_J = tf_idf(count_JN), np.diff(count_JN.indptr) > 0
    rank = min(width, min(weight_JN.shape) - 1)
    rows_JK = np.zeros((len(has_text_J), width), np.float32)
    if rank < 1 or not np.abs(weight_JN.data).sum():
        return rows_JK
    rng = np.random.default_rng(seed)
    _, _, direction_RN = svds(weight_JN, k=rank, v0=rng.standard_normal(min(weight_JN.shape)).astype(np.float32))
    turn_KK = np.linalg.qr(rng.standard_normal((width, width)))[0]
    part_JR = weight_JN @ direction_RN.T
    part_JR -= part_JR[has_text_J].mean(axis=0)
    rows_JK[has_text_J] = (part_JR @ turn_KK[:rank])[has_text_J]
    return rows_JK
