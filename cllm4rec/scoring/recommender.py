"""From requests to answers around the one Scorer: what the endpoint says, without HTTP and without Ray.

    recommender = Recommender.load(model_dir, prepared_dir)
    answers = recommender.answer([RecommendRequest(user_id="u1"), RecommendRequest(history=["i7"], k=5)])

Shapes: B requests of one batch, K the largest k among them.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import RulesConfig
from cllm4rec.scoring.rules import RuleBook, Rules
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.scoring.user_histories import Known, histories_of
from cllm4rec.serving.erased import ErasedUsers
from cllm4rec.serving.schemas import MAX_TEXT_CHARS, RecommendedItem, RecommendRequest, RecommendResponse
from cllm4rec.storage.tombstones import Tombstones


@dataclasses.dataclass(frozen=True)
class EncodedRequest:
    """A request in the model's terms: indices, unknown ids set aside. User -1 is unknown."""

    user: int
    history: list[int]
    exclude: list[int]
    ignored: list[str]


class Recommender:
    """Answers requests with a Scorer and what is known of its users.

    `known` holds the item indices of every user: train, validation and test alike, for in production all that has been
    seen is history. Whom `erased` tells is known no more: neither their embedding nor their history is used.
    """

    def __init__(
        self, scorer: Scorer, known: Known, rules: RuleBook | None = None, erased: Callable[[], Tombstones] = Tombstones
    ) -> None:
        assert len(known.items) == scorer.catalog.num_users + len(known.new_users)
        self.scorer, self.known, self.rules, self.erased = scorer, known, rules, erased
        self._day, self._rules_of_day = datetime.date.min, Rules()

    @classmethod
    def load(cls, model_dir: str, prepared_dir: str, rules: RulesConfig | None = None) -> Recommender:
        """Read a model, the histories it is to be asked with and the rules; every digest of the model is checked.

        The histories may be newer than the model: users and items are matched by id. Erased users are looked up beside
        `prepared_dir`, in its output_dir. Raises ArtifactError where something is missing or damaged, or where model
        and histories have no user or no item in common; DataError where a file of the rules does not fit.
        """
        scorer = Scorer.load(model_dir)
        erased = ErasedUsers(prepared_dir.rstrip("/").rpartition("/")[0] or ".")
        book = RuleBook.read(rules or RulesConfig(), scorer.catalog)
        return cls(scorer, histories_of(prepared_dir, scorer.catalog), book, erased.now)

    @property
    def model_version(self) -> str:
        return self.scorer.model_version

    def answer(self, requests: Sequence[RecommendRequest]) -> list[RecommendResponse]:
        """One forward pass for all; each answer is the one its request would get alone.

        Requests with different k share the pass: it ranks as many as the greediest wants and the others are cut.
        """
        erased = self.erased()
        questions = [self._question(request, erased) for request in requests]
        item_BK, score_BK = self.scorer.top_k(
            np.array([question.user for question in questions], np.int64),
            Ragged.from_lists(question.history for question in questions),
            max(request.k for request in requests),
            self._todays_rules(),
            exclude=Ragged.from_lists(question.exclude for question in questions),
        )
        return [
            self._response(question, items[: request.k], scores[: request.k])
            for request, question, items, scores in zip(requests, questions, item_BK, score_BK, strict=True)
        ]

    def _todays_rules(self) -> Rules:
        """An endpoint lives through many days, and what is available differs from one to the next."""
        today = _today()
        if self.rules is not None and today != self._day:
            self._day, self._rules_of_day = today, self.rules.on(today)
        return self._rules_of_day

    def _question(self, request: RecommendRequest, erased: Tombstones) -> EncodedRequest:
        user, row = self._rows(request.user_id, erased)
        known = self.known.items[row].tolist() if row >= 0 else []
        told, unknown = self._indices(request.history or [])
        exclude, unknown_exclude = self._indices(request.exclude)
        # An item is in a history once, where it first came, as in the histories the model was trained on.
        history = list(dict.fromkeys(known + told))
        return EncodedRequest(user, history, exclude, list(dict.fromkeys(unknown + unknown_exclude)))

    def _rows(self, user_id: str | None, erased: Tombstones) -> tuple[int, int]:
        """A user's row of the user tables and of `known`, each -1 where there is none."""
        if user_id is None or erased.contains([user_id])[0]:
            return -1, -1
        user = self.scorer.catalog.user_index(user_id)
        return user, self.known.new_users.get(user_id, -1) if user < 0 else user

    def _indices(self, item_ids: Sequence[str]) -> tuple[list[int], list[str]]:
        """Indices of the known items and ids of the unknown ones, each in the order given."""
        index_of = self.scorer.catalog.item_index
        indices = [index_of(item_id) for item_id in item_ids]
        known = [index for index in indices if index >= 0]
        return known, [item_id for item_id, index in zip(item_ids, indices, strict=True) if index < 0]

    def _response(
        self, question: EncodedRequest, items: npt.NDArray[np.int64], scores: npt.NDArray[Any]
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


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()
