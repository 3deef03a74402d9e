"""Initializes item embeddings from the texts of the items, so that items with similar texts start close together.

Latent semantic analysis (Deerwester et al., "Indexing by Latent Semantic Analysis", JASIS 1990).

Shapes: J items, N words, R components, K width of the tables.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy import linalg, sparse
from scipy.sparse.linalg import aslinearoperator, eigsh
from torch import Tensor

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.config import Config
from cllm4rec.data.documents import TEXT_KINDS, Documents
from cllm4rec.data.tf_idf import tf_idf
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.cllm4rec import CLLM4Rec, new_model
from cllm4rec.typing import Float32Array


def initial_tables(
    config: Config, backbone: Backbone, token_space: TokenSpace, read: Callable[[], Iterable[Documents]]
) -> dict[str, Tensor]:
    """The tables and the dense parameters beside them before training, as `model.table_init` says.

    read: returns the training documents in parts.
    """
    model = new_model(config.model, backbone, token_space, config.seed)
    if config.model.table_init == "texts":
        init_items_from_texts(model, read(), config.seed)
    return {name: weight.data for name, weight in model.own_parameters().items()}


def init_items_from_texts(model: CLLM4Rec, parts: Iterable[Documents], seed: int) -> None:
    """Set the item rows of both tables to `rows_from_texts`. Other items keep their random rows."""
    count_JN = word_counts(parts, model.token_space.num_items, model.token_space.num_words)
    items, rows = rows_from_texts(count_JN, model.content_items.shape[1], seed)
    with torch.no_grad():
        for table in (model.content_items, model.collaborative_items):
            table[items] = rows.to(table)


def rows_from_texts(count_JN: sparse.csr_array, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """The items with texts, and a row for each: `text_components`, scaled to a mean squared length of 1.

    No items if the texts do not distinguish them.
    """
    items = np.flatnonzero(np.diff(count_JN.indptr))
    rows = text_components(count_JN, width, seed)[items]
    length = np.sqrt(np.square(rows).sum(axis=1).mean()) if len(items) else 0.0
    if length < _MIN_LENGTH:
        items, rows, length = items[:0], rows[:0], 1.0
    return torch.from_numpy(items), torch.from_numpy(rows / length)


_MIN_LENGTH = 1e-6
"""Shorter rows are rounding errors of components that are all zero."""


def word_counts(parts: Iterable[Documents], num_items: int, num_words: int) -> sparse.csr_array:
    """J × N: the count of each token in the texts and reviews of each item. Memory does not grow with the reviews."""
    total_JN = sparse.csr_array((num_items, num_words), dtype=np.float32)
    pending: list[sparse.csr_array] = []
    for documents in parts:
        texts = documents.take(np.flatnonzero(np.isin(documents.kind, TEXT_KINDS) & (documents.item >= 0)))
        index = (np.repeat(texts.item, texts.main.lengths), texts.main.values)
        ones = np.ones(len(texts.main.values), np.float32)
        pending.append(sparse.coo_array((ones, index), shape=total_JN.shape).tocsr())
        # An addition copies the total, so it waits until the pending counts are as large.
        if sum(part.nnz for part in pending) > max(total_JN.nnz, _AT_ONCE):
            total_JN, pending = total_JN + functools.reduce(operator.add, pending), []
    return functools.reduce(operator.add, pending, total_JN)


_AT_ONCE = 1 << 20


def text_components(count_JN: sparse.csr_array, width: int, seed: int) -> Float32Array:
    """J × K: centered principal components of the TF-IDF weights of the items with texts; other rows are zero.

    A random rotation distributes the variance evenly over the dimensions.
    """
    weight_JN, has_text_J = tf_idf(count_JN), np.diff(count_JN.indptr) > 0
    rank = min(width, min(weight_JN.shape) - 1)
    rows_JK = np.zeros((len(has_text_J), width), np.float32)
    if rank < 1 or not np.abs(weight_JN.data).sum():
        return rows_JK
    rng = np.random.default_rng(seed)
    start = rng.standard_normal(min(weight_JN.shape)).astype(np.float32)
    direction_RN = _directions(weight_JN, rank, start, seed)
    rotation_KK = np.linalg.qr(rng.standard_normal((width, width)))[0]
    component_JR = weight_JN @ direction_RN.T
    component_JR -= component_JR[has_text_J].mean(axis=0)
    rows_JK[has_text_J] = (component_JR @ rotation_KK[:rank])[has_text_J]
    return rows_JK


def _directions(weight_JN: sparse.csr_array, rank: int, start: Float32Array, seed: int) -> Float32Array:
    """R × N: the leading right singular vectors, the bits of scipy's `svds(weight_JN, rank, v0=start)`.

    `svds` restarts its iterations from an unseeded generator (scipy 1.17), so texts of fewer kinds than R have other
    directions in each process.
    """
    is_tall = weight_JN.shape[0] >= weight_JN.shape[1]
    matrix = aslinearoperator(weight_JN if is_tall else weight_JN.T)
    _, basis = eigsh(matrix.H @ matrix, k=rank, v0=start, rng=np.random.default_rng(seed))
    basis = np.linalg.qr(basis)[0]
    left, _, right = linalg.svd(matrix.matmat(basis), full_matrices=False)
    return np.asarray((right @ basis.T if is_tall else left.T)[::-1], np.float32)
