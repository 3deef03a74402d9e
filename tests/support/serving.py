"""Helpers of the tests of Recommender and endpoint: a scorer with known answers, and ways to query it."""

from __future__ import annotations

import numpy as np
from fastapi.testclient import TestClient

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.scoring.recommender import Answer, Query, Recommender
from cllm4rec.scoring.user_histories import UserHistories
from cllm4rec.serving.schemas import Ready, RecommendRequest, RecommendResponse, SimilarRequest, SimilarResponse
from cllm4rec.serving.web import create_app, respond, respond_similar

NUM_USERS, NUM_ITEMS = 5, 30


class FakeScorer:
    """The interface of the Scorer, slowly and row by row; scores depend on the user and on the order of the history."""

    def __init__(self, model_version: str = "fake-1") -> None:
        users, items = [f"user{i}" for i in range(NUM_USERS)], [f"item{j:02d}" for j in range(NUM_ITEMS)]
        texts = [f"The text of item {j}. " * 100 for j in range(NUM_ITEMS)]
        self.catalog = Catalog(
            users, items, item_texts=texts, item_counts=[(j * 7) % NUM_ITEMS for j in range(NUM_ITEMS)]
        )
        self.model_version = model_version
        self.num_calls = 0

    def top_k(self, users, histories, k, rules=None, exclude=None):
        self.num_calls += 1
        item_BK, score_BK = np.full((len(users), k), -1, np.int64), np.full((len(users), k), -np.inf, np.float32)
        for row, user in enumerate(users):
            history = histories[row].tolist()
            seen = set(history) | set(exclude[row].tolist())
            scores = self.scores(int(user), history)
            best = sorted((j for j in range(NUM_ITEMS) if j not in seen), key=lambda j: (-scores[j], j))[:k]
            item_BK[row, : len(best)], score_BK[row, : len(best)] = best, scores[best]
        return item_BK, score_BK

    def similar(self, items, k, rules=None):
        """Items are as similar as their numbers are close."""
        distance_BJ = np.abs(np.arange(NUM_ITEMS) - np.asarray(items)[:, None])
        best_BK = np.argsort(distance_BJ, axis=1, kind="stable")[:, 1 : k + 1]
        return best_BK, -np.take_along_axis(distance_BJ, best_BK, 1).astype(np.float32)

    def scores(self, user: int, history: list[int]) -> np.ndarray:
        if user < 0 and not history:
            return self.catalog.item_counts / self.catalog.item_counts.sum()
        place = sum(3 ** (position % 5) * (item + 1) for position, item in enumerate(history))
        return np.array([((user + 2) * 101 + place * 17 + j * j * 29) % 97 for j in range(NUM_ITEMS)], np.float64)


KNOWN = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9], [10, 11]]


def recommender(scorer: FakeScorer | None = None) -> Recommender:
    return Recommender(scorer or FakeScorer(), UserHistories(Ragged.from_lists(KNOWN)))


def ask(**query) -> Answer:
    return recommender().answer([Query(**query)])[0]


def item_ids(answer: Answer) -> list[str]:
    return [item.item_id for item in answer.items]


def expected(user: int, history: list[int], k: int, exclude: tuple[int, ...] = ()) -> list[str]:
    items, _ = FakeScorer().top_k(
        np.array([user]), Ragged.from_lists([history]), k, exclude=Ragged.from_lists([exclude])
    )
    return [f"item{j:02d}" for j in items[0] if j >= 0]


def client(api_keys: tuple[str, ...] = (), *, loaded: bool = True, asked: Recommender | None = None) -> TestClient:
    """The endpoint's application around a Recommender, without Ray and without a network."""
    answering = asked or recommender()

    async def recommend(request: RecommendRequest) -> RecommendResponse:
        return respond(answering, [request])[0]

    async def similar(request: SimilarRequest) -> SimilarResponse | None:
        return respond_similar(answering, [request])[0]

    app = create_app(
        recommend, similar, lambda: Ready(model_version=answering.model_version) if loaded else None, api_keys
    )
    return TestClient(app, raise_server_exceptions=False)


def post(body: bytes, to: TestClient | None = None, **headers: str):
    return (to or client()).post("/v1/recommend", content=body, headers={"content-type": "application/json", **headers})
