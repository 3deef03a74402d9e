"""From requests to answers around the one Scorer: what the endpoint says, without HTTP and without Ray.

    recommender = Recommender.load(model_dir, prepared_dir)
    answers = recommender.answer([RecommendRequest(user_id="u1"), RecommendRequest(history=["i7"], k=5)])

Shapes: B requests of one batch, K the largest k among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm4rec.catalog import Catalog
from cllm4rec.data.prepared import Histories
from cllm4rec.data.ragged import Ragged
from cllm4rec.errors import ArtifactError
from cllm4rec.scoring.rules import Rules, read_rules
from cllm4rec.scoring.scorer import Scorer
from serve.schemas import MAX_TEXT_CHARS, RecommendedItem, RecommendRequest, RecommendResponse


@dataclasses.dataclass(frozen=True)
class _Question:
    """A request in the model's terms: indices, unknown ids set aside. User -1 is unknown."""

    user: int
    history: list[int]
    exclude: list[int]
    ignored: list[str]


class Recommender:
    """Answers requests with a Scorer and what is known of its users.

    `known` holds the item indices of every catalogue user, a row a user index: train, validation and test alike, for in
    production all that has been seen is history.
    """

    def __init__(self, scorer: Scorer, known: Ragged, rules: Rules | None = None) -> None:
        assert len(known) == scorer.catalog.num_users
        self.scorer, self.known, self.rules = scorer, known, rules or Rules()

    @classmethod
    def load(cls, model_dir: str, prepared_dir: str, deny_items: str | None = None) -> Recommender:
        """Read a model, the histories it is to be asked with and a deny list; every digest of the model is checked.

        Raises ArtifactError where one is missing or damaged, or where they speak of different users or items.
        """
        scorer = Scorer.load(model_dir)
        histories = Histories.load(prepared_dir)
        _check_same_catalog(scorer.catalog, Catalog.load(prepared_dir), model_dir, prepared_dir)
        known = histories.together("train", "validation", "test")
        rules, _ = read_rules(deny_items, scorer.catalog)
        return cls(scorer, _by_user(histories.user, known, scorer.catalog.num_users), rules)

    @property
    def model_version(self) -> str:
        return self.scorer.model_version

    def answer(self, requests: Sequence[RecommendRequest]) -> list[RecommendResponse]:
        """One forward pass for all; each answer is the one its request would get alone.

        Requests with different k share the pass: it ranks as many as the greediest wants and the others are cut.
        """
        questions = [self._question(request) for request in requests]
        item_BK, score_BK = self.scorer.top_k(
            np.array([question.user for question in questions], np.int64),
            Ragged.from_lists(question.history for question in questions),
            max(request.k for request in requests),
            self.rules,
            exclude=Ragged.from_lists(question.exclude for question in questions),
        )
        return [
            self._response(question, items[: request.k], scores[: request.k])
            for request, question, items, scores in zip(requests, questions, item_BK, score_BK, strict=True)
        ]

    def _question(self, request: RecommendRequest) -> _Question:
        user = -1 if request.user_id is None else self.scorer.catalog.user_index(request.user_id)
        known = self.known[user].tolist() if user >= 0 else []
        told, unknown = self._indices(request.history or [])
        exclude, unknown_exclude = self._indices(request.exclude)
        # An item is in a history once, where it first came, as in the histories the model was trained on.
        history = list(dict.fromkeys(known + told))
        return _Question(user, history, exclude, list(dict.fromkeys(unknown + unknown_exclude)))

    def _indices(self, item_ids: Sequence[str]) -> tuple[list[int], list[str]]:
        """Indices of the known items and ids of the unknown ones, each in the order given."""
        index_of = self.scorer.catalog.item_index
        indices = [index_of(item_id) for item_id in item_ids]
        known = [index for index in indices if index >= 0]
        return known, [item_id for item_id, index in zip(item_ids, indices, strict=True) if index < 0]

    def _response(
        self, question: _Question, items: npt.NDArray[np.int64], scores: npt.NDArray[Any]
    ) -> RecommendResponse:
        found = items >= 0
        catalog = self.scorer.catalog
        recommended = [
            RecommendedItem(item_id=catalog.item_ids[item], score=score, text=catalog.item_texts[item][:MAX_TEXT_CHARS])
            for item, score in zip(items[found].tolist(), scores[found].tolist(), strict=True)
        ]
        return RecommendResponse(
            items=recommended,
            model_version=self.scorer.model_version,
            cold_start=question.user < 0 and not question.history,
            ignored_items=question.ignored,
        )


def _check_same_catalog(model: Catalog, prepared: Catalog, model_dir: str, prepared_dir: str) -> None:
    # Histories are item indices: read with another catalogue they would be other items, and nothing would tell.
    same_users = np.array_equal(model.user_ids, prepared.user_ids)
    if not same_users or not np.array_equal(model.item_ids, prepared.item_ids):
        raise ArtifactError(
            f"{model_dir} ({model.num_users} users, {model.num_items} items) was not trained on {prepared_dir} "
            f"({prepared.num_users} users, {prepared.num_items} items); "
            "serve a model with the directory it was trained on"
        )


def _by_user(user: npt.NDArray[np.int64], rows: Ragged, num_users: int) -> Ragged:
    """The same rows with one for every user index; a user without a row gets an empty one."""
    places = np.full(num_users, len(rows))
    places[user] = np.arange(len(rows))
    with_empty = Ragged(rows.values, np.append(rows.offsets, rows.offsets[-1]))
    return with_empty.take(places)
