import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cllm4rec.data import world as module
from cllm4rec.data.split import k_core
from cllm4rec.data.world import main, parity_world, sample_world

USERS, ITEMS = 2000, 600


def lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    sample_world(str(folder), USERS, ITEMS, seed=0)
    return folder


@pytest.fixture(scope="module")
def reviews(folder: Path) -> list[dict[str, Any]]:
    return lines(folder / "reviews.json.gz")


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_world(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(["--output", str(tmp_path / name), "--users", "200", "--items", "80", "--seed", str(seed)])
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert not set(digests(tmp_path / "a")) & set(digests(tmp_path / "c"))
    assert len(digests(tmp_path / "a")) == 3, "no partial file is left"
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes()[3:8] == bytes(5), "neither a name nor a time in the gzip header"


def test_the_files_have_the_amazon_2014_shape(folder: Path, reviews: list[dict[str, Any]]) -> None:
    assert {tuple(row) for row in reviews} == {("reviewerID", "asin", "reviewText", "overall", "unixReviewTime")}
    items, users = lines(folder / "items.jsonl.gz"), lines(folder / "users.jsonl.gz")
    assert {tuple(row) for row in items} == {("asin", "title", "description")}
    assert {tuple(row) for row in users} == {("reviewerID", "biography")}
    assert len({row["asin"] for row in items}) == ITEMS
    assert len({row["reviewerID"] for row in users}) == USERS
    assert {row["overall"] for row in reviews} == {1.0, 2.0, 3.0, 4.0, 5.0}
    per_user = Counter(row["reviewerID"] for row in reviews)
    assert 8 <= np.mean(list(per_user.values())) <= 14
    assert len({(row["reviewerID"], row["asin"]) for row in reviews}) == len(reviews), "nobody reviews an item twice"


def test_texts_tell_what_they_are_about_and_vary(folder: Path, reviews: list[dict[str, Any]]) -> None:
    topic_of = {thing: number for number, topic in enumerate(module.TOPICS) for thing in topic.things}
    titles = {row["asin"]: row["title"] for row in lines(folder / "items.jsonl.gz")}
    thing_of = {item: next(thing for thing in topic_of if f" {thing}," in title) for item, title in titles.items()}
    assert all(thing_of[row["asin"]] in row["reviewText"] for row in reviews), "a review names the item's kind of thing"
    assert len({row["reviewText"] for row in reviews}) > 0.7 * len(reviews)
    words = [len(row["reviewText"].split()) for row in reviews]
    assert 10 < np.mean(words) < 30


def test_users_like_what_their_biography_says(folder: Path, reviews: list[dict[str, Any]]) -> None:
    topics_of_user = {
        row["reviewerID"]: {
            number
            for number, topic in enumerate(module.TOPICS)
            if any(deed in row["biography"] for deed in topic.deeds)
        }
        for row in lines(folder / "users.jsonl.gz")
    }
    inside, outside = [], []
    for row in reviews:
        about = {
            number
            for number, topic in enumerate(module.TOPICS)
            if any(f" {deed}" in row["reviewText"] for deed in topic.deeds)
        }
        (inside if about & topics_of_user[row["reviewerID"]] else outside).append(row["overall"])
    assert len(inside) > 2 * len(outside)
    assert np.mean(inside) > np.mean(outside) + 0.8


def liked(reviews: list[dict[str, Any]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], list[str]]:
    """User and item numbers of the 5-core of ratings above 3, and the item ids."""
    rows = [row for row in reviews if row["overall"] > 3]
    users = {user: number for number, user in enumerate(sorted({row["reviewerID"] for row in rows}))}
    ids = sorted({row["asin"] for row in rows})
    items = {item: number for number, item in enumerate(ids)}
    user = np.array([users[row["reviewerID"]] for row in rows])
    item = np.array([items[row["asin"]] for row in rows])
    keep = k_core(user, item, 5)
    return user[keep], item[keep], ids


def test_most_users_stay_and_a_seventh_of_the_items_is_new_with_little_history(reviews: list[dict[str, Any]]) -> None:
    user, item, ids = liked(reviews)
    assert len(np.unique(user)) > 0.9 * USERS
    first_seen: dict[str, int] = {}
    for row in reviews:
        first_seen[row["asin"]] = min(first_seen.get(row["asin"], 1 << 60), row["unixReviewTime"])
    recent = module.FIRST_DAY + 86_400 * module.DAYS * 4 // 5
    counts = Counter(row["asin"] for row in reviews)
    new = [item_id for item_id, time in first_seen.items() if time >= recent]
    assert 0.12 * ITEMS < len(new) < 0.18 * ITEMS
    assert np.quantile([counts[item_id] for item_id in new], 0.95) <= 8
    kept = {ids[number] for number in np.unique(item)}
    assert len(kept.intersection(new)) > 0.9 * len(new), "those who take them up like them"


def test_item_similarity_beats_popularity_by_far(reviews: list[dict[str, Any]]) -> None:
    """EASE (Steck 2019) on a random tenth held out: the structure is there to be learnt, and is not popularity."""
    user, item, _ = liked(reviews)
    held_out = np.random.default_rng(0).random(len(user)) < 0.1
    train = np.zeros((user.max() + 1, item.max() + 1))
    train[user[~held_out], item[~held_out]] = 1.0
    inverse = np.linalg.inv(train.T @ train + 300.0 * np.eye(train.shape[1]))
    ease = train @ (inverse / -np.diag(inverse) * (1 - np.eye(train.shape[1])))

    def recall(scores: npt.NDArray[np.float64]) -> float:
        ranked = np.argsort(-np.where(train > 0, -np.inf, scores), axis=1)[:, :20]
        return float((ranked[user[held_out]] == item[held_out, None]).any(axis=1).mean())

    popularity = recall(np.broadcast_to(train.sum(axis=0), train.shape))
    assert popularity < 0.2
    assert recall(ease) > 3 * popularity


def test_a_user_of_a_larger_world_is_written_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "USERS_PER_CHUNK", 60)
    sample_world(str(tmp_path), 150, 80, seed=3)
    assert [row["reviewerID"] for row in lines(tmp_path / "users.jsonl.gz")] == [f"A{user:09d}" for user in range(150)]
    assert len({row["reviewerID"] for row in lines(tmp_path / "reviews.json.gz")}) == 150


@pytest.mark.parametrize(("users", "items"), [(1, 1), (3, 9), (50, 1000)])
def test_tiny_and_lopsided_worlds_can_be_written(tmp_path: Path, users: int, items: int) -> None:
    sample_world(str(tmp_path), users, items)
    assert len(lines(tmp_path / "items.jsonl.gz")) == items


def test_in_the_parity_world_like_likes_like_and_one_item_each_is_hidden() -> None:
    world = parity_world()
    histories = world.histories
    everything = histories.together("train", "validation", "test")
    assert world.num_users >= 32
    for user in range(world.num_users):
        assert sorted(everything[user].tolist()) == list(range(user % 2, world.num_items, 2))
        assert len(histories.validation[user]) == len(histories.test[user]) == 1
    assert np.ptp(np.bincount(histories.test.values, minlength=world.num_items)) == 0, "popularity gives nothing away"
    assert world.catalog.item_counts.tolist() == np.bincount(histories.train.values, minlength=world.num_items).tolist()


def test_texts_of_the_parity_world_tell_the_parity() -> None:
    world = parity_world()
    user, item, texts = world.reviews()
    assert len(texts) == len(user) == len(world.histories.train.values)
    for number, text in zip(item.tolist(), texts, strict=True):
        assert ("even" in text) == (number % 2 == 0)
        assert ("odd" in text) == (number % 2 == 1)
    for number, text in enumerate(world.catalog.item_texts):
        assert ("even" in text) == (number % 2 == 0)
