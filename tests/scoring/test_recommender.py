"""Answers to requests, without HTTP and without Ray (cllm4rec.scoring.recommender)."""

from __future__ import annotations

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import directories
from support.directories import write_prepared, write_random_model
from support.parity import parity, scorer
from support.serving import KNOWN, NUM_ITEMS, FakeScorer, ask, expected, item_ids, recommender

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import RulesConfig
from cllm4rec.data.world import parity_world
from cllm4rec.errors import ArtifactError
from cllm4rec.scoring.recommender import Recommender
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.scoring.user_histories import Known
from cllm4rec.serving.erased import ErasedUsers
from cllm4rec.serving.schemas import MAX_TEXT_CHARS, RecommendRequest
from cllm4rec.storage.tombstones import Tombstones


def test_known_user_is_answered_from_the_known_history_best_first():
    answer = ask(user_id="user2", k=7)
    assert item_ids(answer) == expected(2, KNOWN[2], 7)
    assert [item.score for item in answer.items] == sorted((item.score for item in answer.items), reverse=True)
    assert answer.model_version == "fake-1"
    assert not answer.cold_start


def test_history_of_a_known_user_is_appended_to_what_is_known():
    assert item_ids(ask(user_id="user1", history=["item20", "item12"])) == expected(1, [3, 4, 20, 12], 10)


def test_items_given_twice_or_already_known_count_once():
    assert item_ids(ask(user_id="user1", history=["item12", "item04", "item12"])) == expected(1, [3, 4, 12], 10)


@pytest.mark.parametrize("nobody", [{}, {"user_id": "a stranger"}])
def test_stranger_with_a_history_is_answered_from_it(nobody):
    answer = ask(history=["item07", "item03"], **nobody)
    assert item_ids(answer) == expected(-1, [7, 3], 10)
    assert not answer.cold_start


@pytest.mark.parametrize(
    "nothing_known",
    [{"user_id": "a stranger"}, {"history": []}, {"user_id": "a stranger", "history": ["no such item"]}],
)
def test_stranger_without_a_known_history_gets_the_popular_items(nothing_known):
    answer = ask(k=3, **nothing_known)
    counts = FakeScorer().catalog.item_counts
    assert item_ids(answer) == [f"item{j:02d}" for j in np.argsort(-counts)[:3]]
    assert answer.items[0].score == pytest.approx(counts.max() / counts.sum())
    assert answer.cold_start


def test_unknown_items_are_ignored_and_listed_once_each_in_the_order_given():
    answer = ask(history=["ghost", "item07", "spectre", "ghost"], exclude=["wraith", "item01", "spectre"])
    assert answer.ignored_items == ["ghost", "spectre", "wraith"]
    assert item_ids(answer) == expected(-1, [7], 10, exclude=(1,))


def test_excluded_items_are_not_recommended_and_do_not_count_as_history():
    plain = item_ids(ask(user_id="user0", k=5))
    left = item_ids(ask(user_id="user0", k=5, exclude=plain[:2]))
    assert left[:3] == plain[2:]
    assert not set(left) & set(plain[:2])


def test_fewer_items_come_back_where_fewer_remain():
    answer = ask(user_id="user2", k=1000)
    assert len(answer.items) == NUM_ITEMS - len(KNOWN[2])
    assert all(np.isfinite(item.score) for item in answer.items)


def test_texts_belong_to_their_items_and_are_cut():
    for item in ask(user_id="user0").items:
        assert item.text.startswith(f"The text of item {int(item.item_id[4:])}. ")
        assert len(item.text) == MAX_TEXT_CHARS


ITEM = st.integers(0, NUM_ITEMS + 2).map(lambda j: f"item{j:02d}")
REQUEST = st.builds(
    RecommendRequest,
    user_id=st.none() | st.sampled_from(["user0", "user3", "a stranger"]),
    history=st.lists(ITEM, max_size=5),
    exclude=st.lists(ITEM, max_size=5),
    k=st.integers(1, NUM_ITEMS + 5),
)


@given(st.lists(REQUEST, min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_answer_in_a_batch_equals_the_answer_alone_and_a_batch_is_one_pass(requests):
    fake = FakeScorer()
    together = recommender(fake).answer(requests)
    assert fake.num_calls == 1
    assert together == [recommender().answer([request])[0] for request in requests]


# The real Scorer


def test_trained_model_recommends_what_a_user_hides_and_reads_the_history_of_a_stranger():
    world = parity().world
    known = world.histories.together("train", "validation")
    asked = Recommender(scorer(), Known(known))
    users = asked.answer([RecommendRequest(user_id=user_id, k=1) for user_id in world.catalog.user_ids])
    assert [item_ids(answer) for answer in users] == [[world.catalog.item_ids[j]] for j in world.histories.test.values]
    strangers = [RecommendRequest(history=world.catalog.item_ids[known[user]].tolist(), k=1) for user in range(10)]
    numbers = [int(item_ids(answer)[0].removeprefix("item-")) for answer in asked.answer(strangers)]
    assert [number % 2 for number in numbers] == [user % 2 for user in range(10)]


def test_directories_are_loaded_with_all_that_is_known_and_what_is_denied(tmp_path):
    prepared_dir = write_prepared(tmp_path / "prepared")
    model_dir = write_random_model(tmp_path / "run", prepared_dir, seed=0)
    catalog, histories = parity_world().catalog, parity_world().histories
    (tmp_path / "denied.txt").write_text(f"{catalog.item_ids[1]}\nno such item\n")

    plain = Recommender.load(model_dir, prepared_dir)
    denying = Recommender.load(model_dir, prepared_dir, RulesConfig(deny=str(tmp_path / "denied.txt")))
    everything = RecommendRequest(user_id=catalog.user_ids[0], k=1000)
    seen = {catalog.item_ids[j] for split in (histories.train, histories.validation, histories.test) for j in split[0]}
    assert set(item_ids(plain.answer([everything])[0])) == set(catalog.item_ids) - seen
    assert set(item_ids(denying.answer([everything])[0])) == set(catalog.item_ids) - seen - {catalog.item_ids[1]}
    assert plain.model_version == Scorer.load(model_dir).model_version


def test_older_model_is_asked_with_newer_histories_by_id(tmp_path, monkeypatch):
    """Ten users and four items more, so that every index moves: a user is answered from what was theirs."""
    prepared_dir = write_prepared(tmp_path / "prepared")
    model_dir = write_random_model(tmp_path / "run", prepared_dir, seed=0)
    first = Recommender.load(model_dir, prepared_dir)
    old, newer = parity_world(), parity_world(num_users=50, num_items=24)
    newer.catalog.user_ids[:] = [f"a-new-{row}" for row in range(10)] + old.catalog.user_ids.tolist()
    later_items = [f"a-new-{row}" for row in range(4)]
    newer.catalog.item_ids[:] = [*later_items[:3], *old.catalog.item_ids, later_items[3]]
    monkeypatch.setattr(directories, "parity_world", lambda: newer)
    later = Recommender.load(model_dir, write_prepared(tmp_path / "newer"))
    together = newer.histories.together("train", "validation", "test")
    old_ids = set(old.catalog.item_ids)
    for row, user_id in enumerate(newer.catalog.user_ids.tolist()):
        history = [item_id for item_id in newer.catalog.item_ids[together[row]] if item_id in old_ids]
        named = later.answer([RecommendRequest(user_id=user_id, k=30)])[0]
        assert not set(item_ids(named)) & set(history)
        if user_id.startswith("a-new"):
            assert named == later.answer([RecommendRequest(history=history, k=30)])[0]
            assert not named.cold_start
        else:
            known = Known(Ragged.from_lists([[] for _ in old.catalog.user_ids]))
            unread = Recommender(first.scorer, known).answer([RecommendRequest(user_id=user_id, history=history, k=30)])
            assert named == unread[0]


def test_model_and_prepared_directory_of_different_data_are_refused(tmp_path, monkeypatch):
    prepared_dir = write_prepared(tmp_path / "prepared")
    model_dir = write_random_model(tmp_path / "run", prepared_dir, seed=0)
    others = parity_world()
    others.catalog.item_ids[:] = [f"other-{item_id}" for item_id in others.catalog.item_ids]
    monkeypatch.setattr(directories, "parity_world", lambda: others)
    with pytest.raises(ArtifactError, match="no user or no item in common"):
        Recommender.load(model_dir, write_prepared(tmp_path / "others"))


# Erased users


def test_erased_user_is_a_stranger_from_the_next_look_on(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr("cllm4rec.serving.erased.time", types.SimpleNamespace(monotonic=lambda: clock.now))
    prepared_dir = write_prepared(tmp_path / "prepared")
    endpoint = Recommender.load(write_random_model(tmp_path, prepared_dir, seed=0), prepared_dir)
    item = parity_world().catalog.item_ids[4]
    requests = [RecommendRequest(user_id=user_id, k=30) for user_id in parity_world().catalog.user_ids[:3]]
    requests.append(RecommendRequest(user_id=requests[0].user_id, history=[item]))
    before = endpoint.answer(requests)
    popular, told = endpoint.answer([RecommendRequest(history=[], k=30), RecommendRequest(history=[item])])

    Tombstones.load(str(tmp_path)).with_users([requests[0].user_id]).save(str(tmp_path))
    assert endpoint.answer(requests) == before, "it is looked for once a second, not with every batch"
    clock.now += 1.0
    assert endpoint.answer(requests) == [popular, *before[1:3], told]

    Tombstones.load(str(tmp_path)).with_users([requests[2].user_id]).save(str(tmp_path))
    clock.now += 1.0
    assert endpoint.answer(requests) == [popular, before[1], popular, told]


@pytest.mark.parametrize("harm", ["damage", "remove"])
def test_nobody_comes_back_where_the_list_of_the_erased_is_lost(tmp_path, monkeypatch, caplog, harm):
    Tombstones().with_users(["user1"]).save(str(tmp_path))
    erased = ErasedUsers(str(tmp_path), every_s=0.0)
    (tmp_path / "erased.json").unlink() if harm == "remove" else (tmp_path / "erased.json").write_text("{")
    for _ in range(3):
        assert erased.now().contains(["user1", "user2"]).tolist() == [True, False]
    assert len(caplog.records) == 1
    Tombstones().with_users(["user1", "user2"]).save(str(tmp_path))
    assert erased.now().contains(["user1", "user2"]).tolist() == [True, True]


def test_endpoint_does_not_start_without_knowing_who_was_erased(tmp_path):
    prepared_dir = write_prepared(tmp_path / "prepared")
    model_dir = write_random_model(tmp_path, prepared_dir, seed=0)
    (tmp_path / "erased.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"erased\.json is damaged"):
        Recommender.load(model_dir, prepared_dir)
