"""What a comparison changes to find out what a result is due to."""

from __future__ import annotations

import dataclasses

import numpy as np

from cllm4rec.config import BackboneSize, Config
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.errors import DataError
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.stock_backbone import random_backbone
from cllm4rec.typing import IntArray


def shuffled_texts(documents: Documents, seed: int) -> Documents:
    """Each text about another item: reviews change places among the items of their reviewer, items' own texts among all items.

    Who wrote how much about which item is kept, and only what is written is not: a result that survives this is due to
    authorship. A text keeps its place if it is the only one of its reviewer.
    """
    source = np.arange(len(documents))
    generator = np.random.default_rng(seed)
    for kind, group in ((Kind.REVIEW, documents.user), (Kind.ITEM_TEXT, np.zeros(len(documents), np.int64))):
        rows = documents.rows_of([kind])
        rows = rows[np.lexsort((generator.random(len(rows)), group[rows]))]
        source[rows] = rows[_next_in_group(group[rows])]
    return dataclasses.replace(documents, main=documents.main.take(source))


def _next_in_group(group: IntArray) -> IntArray:
    """For each place of sorted groups the next place of its group, and the first for the last."""
    if not len(group):
        return np.zeros(0, np.int64)
    is_first = np.append(True, group[1:] != group[:-1])
    first = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
    is_last = np.append(is_first[1:], True)
    return np.where(is_last, first, np.arange(len(group)) + 1)


def random_weights(config: Config) -> Backbone:
    """The architecture of a pretrained model with random weights. Raises DataError if the model is not pretrained."""
    model = config.model
    if isinstance(model.backbone, BackboneSize):
        raise DataError("the language model is built with random weights, so there is nothing to replace")
    return random_backbone(model.backbone, model.revision, model.max_tokens, config.seed)
