"""Answers by user id, without HTTP and without Ray (cllm4rec.scoring.recommender)."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import directories
from support.directories import write_prepared, write_random_model
from support.parity import parity, scorer
from support.serving import KNOWN, NUM_ITEMS, FakeScorer, ask, client, expected, item_ids, recommender

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import RulesConfig
from cllm4rec.data.world import parity_world
from cllm4rec.errors import ArtifactError, ConfigError
from cllm4rec.scoring.recommender import LISTS_SCHEMA, Query, Recommender
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.scoring.user_histories import UserHistories
from cllm4rec.storage.artifacts import read_manifest
from cllm4rec.storage.registry import promote_directory
from cllm4rec.storage.tombstones import CHECK_EVERY_S, Tombstones


def test_known_user_is_answered_from_the_known_history_best_first():
    answer = ask(user_id="user2", k=7)
    assert item_ids(answer) == expected(2, KNOWN[2], 7)
    assert [item.score for item in answer.items] == sorted((item.score for item in answer.items), reverse=True)
    assert not answer.cold_start


def test_history_of_a_known_user_is_appended_to_what_is_known():
    assert item_ids(ask(user_id="user1", history=["item20", "item12"])) == expected(1, [3, 4, 20, 12], 10)


def test_items_given_twice_or_already_known_count_once():
    assert item_ids(ask(user_id="user1", history=["item12", "item04", "item12"])) == expected(1, [3, 4, 12], 10)


@pytest.mark.parametrize("user", [{}, {"user_id": "a stranger"}])
def test_stranger_with_a_history_is_answered_from_it(user):
    answer = ask(history=["item07", "item03"], **user)
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


def test_texts_belong_to_their_items():
    for item in ask(user_id="user0").items:
        assert item.text.startswith(f"The text of item {int(item.item_id[4:])}. ")


def test_no_query_has_no_answer():
    assert recommender().answer([]) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "neither user_id nor history"),
        ({"exclude": ["item01"]}, "neither user_id nor history"),
        ({"user_id": 7}, r"user_id is of type int; ids are strings"),
        ({"history": "item01"}, "history is of type str; give a list of item ids"),
        ({"history": {"item01"}}, "history is of type set; give a list"),
        ({"history": ["item01", 2]}, "history holds a value of type int"),
        ({"user_id": "user0", "exclude": [None]}, "exclude holds a value of type NoneType"),
        ({"user_id": "user0", "exclude": None}, "exclude is of type NoneType"),
        *(
            ({"user_id": "user0", "k": k}, "k is .*; give a whole number from 1 to 1000")
            for k in (0, 1001, 2.5, "3", True)
        ),
    ],
)
def test_malformed_query_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Query(**wrong)
    with pytest.raises(ConfigError, match=message):
        recommender().recommend(**wrong)


ITEM = st.integers(0, NUM_ITEMS + 2).map(lambda j: f"item{j:02d}")
QUERY = st.builds(
    Query,
    user_id=st.none() | st.sampled_from(["user0", "user3", "a stranger"]),
    history=st.lists(ITEM, max_size=5),
    exclude=st.lists(ITEM, max_size=5),
    k=st.integers(1, NUM_ITEMS + 5),
)


@given(st.lists(QUERY, min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_answer_in_a_batch_equals_the_answer_alone_and_a_batch_is_one_pass(queries):
    fake = FakeScorer()
    together = recommender(fake).answer(queries)
    assert fake.num_calls == 1
    assert together == [recommender().answer([query])[0] for query in queries]


# Tables


def frame(**columns) -> pd.DataFrame:
    return pd.DataFrame(columns)


def as_lists(table: pd.DataFrame) -> list[list[tuple[str, float, str]]]:
    return [
        list(zip(*row, strict=True)) for row in zip(table["item_ids"], table["scores"], table["texts"], strict=True)
    ]


def test_a_table_has_the_answers_of_its_rows_in_their_order():
    users = ["user3", "a stranger", None, "user0"]
    histories = [None, ["item07", "item03"], ["item01"], []]
    excluded = [["item02"], None, [], ["item04", "ghost"]]
    table = frame(user_id=users, history=histories, exclude=excluded)
    table.index = [7, 3, 3, 1]
    rows = zip(users, histories, excluded, strict=True)
    alone = [recommender().recommend(user, history=history, exclude=out or (), k=4) for user, history, out in rows]

    found = recommender().recommend_many(table, k=4)
    assert list(found.columns) == LISTS_SCHEMA.names
    assert found.index.tolist() == [7, 3, 3, 1]
    assert found["user_id"].fillna("").tolist() == ["user3", "a stranger", "", "user0"]
    assert as_lists(found) == alone
    assert found["scores"].iloc[0].dtype == np.float32

    arrow = recommender().recommend_many(pa.Table.from_pandas(table, preserve_index=False), k=4)
    assert arrow.schema == LISTS_SCHEMA
    assert as_lists(arrow.to_pandas()) == alone


@pytest.mark.parametrize("column", ["user_id", "history"])
def test_one_of_the_two_columns_is_enough(column):
    values = {"user_id": ["user1", "user2"], "history": [["item05"], ["item06"]]}[column]
    found = recommender().recommend_many(frame(**{column: values}), k=2)
    assert as_lists(found) == [recommender().recommend(**{column: value}, k=2) for value in values]
    assert found["user_id"].fillna("").tolist() == (values if column == "user_id" else ["", ""])


def test_any_column_of_strings_and_of_lists_is_read():
    as_categories = pd.Series(["user1", "user1"], dtype="category")
    as_arrays = pd.Series([np.array(["item05"], object), ("item06", "item07")])
    expected_lists = recommender().recommend_many(
        frame(user_id=["user1", "user1"], history=[["item05"], ["item06", "item07"]])
    )
    found = recommender().recommend_many(frame(user_id=as_categories, history=as_arrays))
    assert as_lists(found) == as_lists(expected_lists)
    arrow = pa.table(
        {
            "user_id": pa.array(["user1", "user1"], pa.large_string()),
            "history": pa.array([["item05"], ["item06", "item07"]], pa.large_list(pa.large_string())),
        }
    )
    assert as_lists(recommender().recommend_many(arrow).to_pandas()) == as_lists(expected_lists)


def test_a_long_table_is_answered_in_batches_of_bounded_size():
    fake = FakeScorer()
    users = [f"user{row % 7}" for row in range(150)]
    found = recommender(fake).recommend_many(frame(user_id=users), k=1000)
    assert fake.num_calls > 1
    by_user = {user: recommender().recommend(user, k=1000) for user in set(users)}
    assert as_lists(found) == [by_user[user] for user in users]


@pytest.mark.parametrize("empty", [frame(user_id=[]), pa.table({"history": pa.array([], pa.list_(pa.string()))})])
def test_an_empty_table_has_an_empty_answer(empty):
    found = recommender().recommend_many(empty)
    assert (type(found), len(found)) == (type(empty), 0)
    assert list(found.columns if isinstance(found, pd.DataFrame) else found.column_names) == LISTS_SCHEMA.names


@pytest.mark.parametrize(
    ("users", "message"),
    [
        (frame(exclude=[["item01"]]), "neither the column user_id nor the column history"),
        (frame(user_id=["user1"], age=[3]), "got the column age; select the columns user_id, history and exclude"),
        (pa.table([["a"], ["b"]], names=["user_id", "user_id"]), "got a column twice"),
        (["user1"], "takes a pandas DataFrame or an Arrow table, not list"),
        (frame(user_id=[1, 2]), "row 0 of the table: user_id is of type int; ids are strings"),
        (frame(user_id=["user1", None]), "row 1 of the table: a query has neither user_id nor history"),
        (frame(history=["item01"]), "row 0 of the table: history is of type str"),
        (frame(history=[["item01"], ["item01", None]]), "row 1 of the table: history holds a value of type NoneType"),
        (frame(user_id=["user1", 2]), "holds values of different types"),
        (frame(history=[["item01"], "item01"]), "holds values of different types"),
    ],
)
def test_a_wrong_table_is_refused(users, message):
    with pytest.raises(ConfigError, match=message):
        recommender().recommend_many(users)


@pytest.mark.parametrize("k", [0, 1001, "3"])
def test_a_wrong_k_is_refused_for_a_table_too(k):
    with pytest.raises(ConfigError, match=r"k is .*; give a whole number from 1 to 1000"):
        recommender().recommend_many(frame(user_id=["user1"]), k=k)


# The real Scorer


def test_trained_model_recommends_what_a_user_hides_and_reads_the_history_of_a_stranger():
    world = parity().world
    known = world.histories.together("train", "validation")
    asked = Recommender(scorer(), UserHistories(known))
    users = asked.answer([Query(user_id=user_id, k=1) for user_id in world.catalog.user_ids])
    assert [item_ids(answer) for answer in users] == [[world.catalog.item_ids[j]] for j in world.histories.test.values]
    strangers = [Query(history=world.catalog.item_ids[known[user]].tolist(), k=1) for user in range(10)]
    numbers = [int(item_ids(answer)[0].removeprefix("item-")) for answer in asked.answer(strangers)]
    assert [number % 2 for number in numbers] == [user % 2 for user in range(10)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output_dir with a random model and the prepared parity world."""
    folder = tmp_path_factory.mktemp("run")
    write_random_model(folder, write_prepared(folder / "prepared"), seed=0)
    return folder


QUERIES = [
    *({"user_id": user_id} for user_id in parity_world().catalog.user_ids),
    *(
        {"user_id": f"user-{row:02d}", "history": ["item-03", "ghost", "item-11"], "exclude": ["item-00"]}
        for row in range(4)
    ),
    *({"history": [f"item-{row:02d}", f"item-{2 * row:02d}"], "exclude": ["item-19"]} for row in range(4)),
    {"user_id": "a stranger"},
    {"user_id": "a stranger", "history": ["item-05"]},
    {"history": ["ghost"]},
]


def test_scorer_endpoint_and_recommender_have_the_same_answers_bit_for_bit(run_dir):
    rec, k = Recommender.from_pretrained(run_dir), 12
    world, scorer = parity_world(), Scorer.load(str(run_dir / "model"))
    user_of, item_of = world.catalog.user_index, world.catalog.item_index
    stored = world.histories.together("train", "validation", "test")

    def indices(query: dict, name: str) -> list[int]:
        return [item_of(item_id) for item_id in query.get(name, []) if item_of(item_id) >= 0]

    users = np.array([user_of(query.get("user_id", "")) for query in QUERIES])
    histories = [
        [*(stored[user].tolist() if user >= 0 else []), *indices(query, "history")]
        for user, query in zip(users, QUERIES, strict=True)
    ]
    exclude = Ragged.from_lists([indices(query, "exclude") for query in QUERIES])
    item_BK, score_BK = scorer.top_k(users, Ragged.from_lists(histories), k, exclude=exclude)
    expected = [
        [
            (world.catalog.item_ids[item], float(score), world.catalog.item_texts[item])
            for item, score in zip(items[items >= 0], scores[items >= 0], strict=True)
        ]
        for items, scores in zip(item_BK, score_BK, strict=True)
    ]

    http = client(asked=rec)
    responses = [http.post("/v1/recommend", json={**query, "k": k}).json()["items"] for query in QUERIES]
    assert [[tuple(item.values()) for item in items] for items in responses] == expected
    assert [rec.recommend(**query, k=k) for query in QUERIES] == expected
    table = pd.DataFrame(QUERIES)
    assert as_lists(rec.recommend_many(table, k=k)) == expected
    arrow = rec.recommend_many(pa.Table.from_pandas(table, preserve_index=False), k=k)
    assert arrow["scores"].combine_chunks().values.to_numpy().tobytes() == score_BK[item_BK >= 0].tobytes()
    assert len({str(items) for items in expected}) > len(expected) / 2


def test_directories_are_loaded_with_all_that_is_known_and_what_is_denied(run_dir, tmp_path):
    directories_of_run = str(run_dir / "model"), str(run_dir / "prepared")
    catalog, histories = parity_world().catalog, parity_world().histories
    (tmp_path / "denied.txt").write_text(f"{catalog.item_ids[1]}\nno such item\n")

    plain = Recommender.from_pretrained(*directories_of_run)
    denying = Recommender.from_pretrained(*directories_of_run, rules=RulesConfig(deny=str(tmp_path / "denied.txt")))
    everything = Query(user_id=catalog.user_ids[0], k=1000)
    seen = {catalog.item_ids[j] for split in (histories.train, histories.validation, histories.test) for j in split[0]}
    assert set(item_ids(plain.answer([everything])[0])) == set(catalog.item_ids) - seen
    assert set(item_ids(denying.answer([everything])[0])) == set(catalog.item_ids) - seen - {catalog.item_ids[1]}
    assert plain.model_version == Scorer.load(directories_of_run[0]).model_version


def test_the_current_model_of_a_run_is_the_promoted_one(tmp_path):
    prepared_dir = write_prepared(tmp_path / "prepared")
    write_random_model(tmp_path, prepared_dir, seed=0)
    version = Recommender.from_pretrained(str(tmp_path)).model_version
    promote_directory(str(tmp_path), read_manifest(str(tmp_path / "model"), "model").digest, "a test", keep=2)
    write_random_model(tmp_path, prepared_dir, seed=1)
    assert Recommender.from_pretrained(str(tmp_path)).model_version == version
    assert Recommender.from_pretrained(str(tmp_path / "model"), prepared_dir).model_version != version


def test_a_directory_that_is_no_run_is_refused_with_what_to_give(run_dir, tmp_path):
    for name in ("model", "prepared"):
        with pytest.raises(ConfigError, match=r"is one directory of a run; give the output_dir that contains it"):
            Recommender.from_pretrained(str(run_dir / name))
    with pytest.raises(ArtifactError, match="is not a finished model directory"):
        Recommender.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match="is not a finished model directory"):
        Recommender.from_pretrained(str(run_dir), str(run_dir / "prepared"))
    with pytest.raises(ArtifactError, match="is not a finished prepared directory"):
        Recommender.from_pretrained(str(run_dir / "model"), str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"device": "tpu"}, "device is 'tpu'; give 'cpu' or 'cuda', or leave it out"),
        ({"device": "meta"}, "device is 'meta'; give 'cpu' or 'cuda'"),
        ({"rules": {"denied": "x.csv"}}, "score.rules.denied is not a setting"),
        ({"rules": {"min_support": -1}}, "score.rules.min_support is -1 and should be at least 0"),
        ({"rules": "deny.csv"}, "rules is of type str; give load_config"),
        ({"directory": None}, "the directory is of type NoneType; give the output_dir of a run"),
    ],
)
def test_a_wrong_argument_of_from_pretrained_is_refused_in_a_sentence(run_dir, arguments, sentence):
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}"):
        Recommender.from_pretrained(**{"directory": run_dir} | arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU")
def test_a_gpu_that_is_not_there_is_told(run_dir):
    with pytest.raises(ConfigError, match="device is 'cuda', and torch finds no GPU; give 'cpu', or leave it out"):
        Recommender.from_pretrained(run_dir, device="cuda")


def test_rules_may_be_a_dictionary_in_the_form_of_the_config(run_dir, tmp_path):
    (best,) = Recommender.from_pretrained(run_dir).recommend(user_id="user-00", k=1)
    (tmp_path / "deny.csv").write_text(f"item_id\n{best.item_id}\n")
    ruled = Recommender.from_pretrained(run_dir, rules={"deny": str(tmp_path / "deny.csv")})
    assert best.item_id not in {item.item_id for item in ruled.recommend(user_id="user-00", k=5)}


def test_a_series_is_read_in_its_order_and_not_by_its_labels(run_dir):
    rec, history = Recommender.from_pretrained(run_dir), ["item-03", "item-11"]
    series = pd.Series(history, index=[1, 0])
    found = rec.recommend(history=series, exclude=pd.Series(["item-00"]))
    assert found == rec.recommend(history=history, exclude=["item-00"])


def test_recommending_needs_no_ray(run_dir):
    code = (
        "import sys\nfrom cllm4rec import Recommender\n"
        f"print(len(Recommender.from_pretrained({str(run_dir)!r}).recommend('user-00', k=3)))\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'ray', 'deepspeed', 'fastapi'}))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n[]\n"


def test_older_model_is_asked_with_newer_histories_by_id(run_dir, tmp_path, monkeypatch):
    """Ten users and four items more, so that every index changes: each user is served from their own history."""
    model_dir = str(run_dir / "model")
    first = Recommender.from_pretrained(str(run_dir))
    old, newer = parity_world(), parity_world(num_users=50, num_items=24)
    newer.catalog.user_ids[:] = [f"a-new-{row}" for row in range(10)] + old.catalog.user_ids.tolist()
    later_items = [f"a-new-{row}" for row in range(4)]
    newer.catalog.item_ids[:] = [*later_items[:3], *old.catalog.item_ids, later_items[3]]
    monkeypatch.setattr(directories, "parity_world", lambda: newer)
    later = Recommender.from_pretrained(model_dir, write_prepared(tmp_path / "newer"))
    together = newer.histories.together("train", "validation", "test")
    old_ids = set(old.catalog.item_ids)
    for row, user_id in enumerate(newer.catalog.user_ids.tolist()):
        history = [item_id for item_id in newer.catalog.item_ids[together[row]] if item_id in old_ids]
        named = later.answer([Query(user_id=user_id, k=30)])[0]
        assert not set(item_ids(named)) & set(history)
        if user_id.startswith("a-new"):
            assert named == later.answer([Query(history=history, k=30)])[0]
            assert not named.cold_start
        else:
            empty = UserHistories(Ragged.from_lists([[] for _ in old.catalog.user_ids]))
            unread = Recommender(first.scorer, empty).answer([Query(user_id=user_id, history=history, k=30)])
            assert named == unread[0]


def test_model_and_prepared_directory_of_different_data_are_refused(run_dir, tmp_path, monkeypatch):
    others = parity_world()
    others.catalog.item_ids[:] = [f"other-{item_id}" for item_id in others.catalog.item_ids]
    monkeypatch.setattr(directories, "parity_world", lambda: others)
    with pytest.raises(ArtifactError, match="no user or no item in common"):
        Recommender.from_pretrained(str(run_dir / "model"), write_prepared(tmp_path / "others"))


# Erased users


def test_erased_user_is_unknown_within_a_second(tmp_path):
    write_random_model(tmp_path, write_prepared(tmp_path / "prepared"), seed=0)
    erased, other = parity_world().catalog.user_ids[:2]
    rec = Recommender.from_pretrained(str(tmp_path))
    queries = [Query(user_id=erased, k=30), Query(user_id=other, k=30), Query(erased, ["item-04"])]
    before = rec.answer(queries)
    popular, from_history = rec.answer([Query(history=[], k=30), Query(history=["item-04"])])
    Tombstones.load(str(tmp_path)).with_users([erased]).save(str(tmp_path))
    time.sleep(CHECK_EVERY_S)
    assert rec.answer(queries) == [popular, before[1], from_history]


def test_nothing_is_loaded_without_knowing_who_was_erased(run_dir, tmp_path):
    prepared_dir = write_prepared(tmp_path / "prepared")
    (tmp_path / "erased.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"erased\.json is damaged"):
        Recommender.from_pretrained(str(run_dir / "model"), prepared_dir)


# Similar items


def test_similar_items_of_many_are_those_of_each_and_unknown_ones_have_none():
    asked = recommender()
    first, unknown, last = asked.similar_many(["item03", "ghost", "item29"], 2)
    assert unknown is None
    assert first == asked.similar("item03", k=2)
    assert [item.item_id for item in last] == ["item28", "item27"]
    with pytest.raises(ConfigError, match="no item with this id"):
        asked.similar("ghost")
