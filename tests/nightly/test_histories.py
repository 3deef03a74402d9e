"""Fresh events join the histories: in order, each item once, new users last, erased users not at all."""

import numpy as np
import pyarrow as pa
import pytest
from support.directories import write_prepared, write_random_model

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.prepared import bucket_name, bucket_paths, load_histories
from cllm4rec.data.world import parity_world
from cllm4rec.nightly.events import EVENTS, BucketMap, events_of
from cllm4rec.nightly.histories import HISTORIES, Bucket, files_per_bucket, merge_bucket, with_events, write_bucket
from cllm4rec.storage.files import read_tables, write_table
from cllm4rec.storage.tombstones import Tombstones

KNOWN = pa.table({"user": [7, 3], "user_id": ["ann", "bob"], "items": Ragged.from_lists([[3, 1], [2]]).to_arrow()})


def events(*rows):
    columns = zip(*rows, strict=True) if rows else ([], [], [], [], [])
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, EVENTS, strict=True)], schema=EVENTS
    )


def test_events_are_added_by_time_then_file_then_line_and_what_is_known_stays_in_its_place():
    merged, counts = with_events(
        KNOWN,
        events(
            ("ann", 9, 50, 0, 1), ("ann", 1, 10, 0, 2), ("ann", 8, 20, 1, 3), ("ann", 7, 20, 0, 4), ("ann", 6, 20, 0, 5)
        ),
    )  # fmt: skip
    assert merged.to_pydict() == {"user": [7, 3], "user_id": ["ann", "bob"], "items": [[3, 1, 7, 6, 8, 9], [2]]}
    assert counts == {"new_users": 0, "users_with_news": 1, "new_interactions": 4}


def test_users_of_events_alone_come_last_by_id_with_each_item_once():
    merged, counts = with_events(KNOWN, events(("zoe", 4, 9, 0, 1), ("cyd", 5, 9, 0, 2), ("zoe", 4, 1, 0, 3)))
    assert merged["user_id"].to_pylist() == ["ann", "bob", "cyd", "zoe"]
    assert merged["user"].to_pylist() == [7, 3, -1, -1]
    assert merged["items"].to_pylist()[2:] == [[5], [4]]
    assert counts == {"new_users": 2, "users_with_news": 0, "new_interactions": 2}


@pytest.mark.parametrize("known", [KNOWN, KNOWN.slice(0, 0)])
def test_a_night_without_events_changes_nothing(known):
    merged, counts = with_events(known, events())
    assert merged.to_pydict() == known.to_pydict()
    assert set(counts.values()) == {0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("histories")
    prepared = write_prepared(folder / "prepared", num_buckets=10)
    return prepared, write_random_model(folder, prepared, seed=0)


def test_a_known_user_belongs_to_the_bucket_of_their_history_and_new_ones_to_those_after(world):
    prepared, model = world
    files = bucket_paths(prepared, "histories")
    size = files_per_bucket(100, 10**6)
    assert (files_per_bucket(10, 40), size, files_per_bucket(1000, 4 * 10**6)) == (1, 3, 8)
    for per_bucket in (1, 3):
        bucket_map = BucketMap(prepared, model, num_users=40, num_files=10, files_per_bucket=per_bucket, num_new=2)
        for place in range(0, 10, per_bucket):
            bucket = Bucket(place // per_bucket, tuple(files[place : place + per_bucket]), "nowhere")
            merged, _ = merge_bucket(bucket, prepared, model, Tombstones())
            assert set(bucket_map.bucket_of(merged["user_id"]).tolist()) == {bucket.number}
            assert set(merged["bucket"].to_pylist()) == {bucket.number}
        num_known = -(-10 // per_bucket)
        new = bucket_map.bucket_of(pa.array([f"new-{number}" for number in range(50)]))
        assert set(new.tolist()) == {num_known, num_known + 1}
    assert bucket_map.item_of(pa.array(["item-03", "ghost"])).tolist() == [3, -1]


def test_a_bucket_is_its_files_its_events_and_nobody_erased(world, tmp_path):
    prepared, model = world
    folder = events_of(str(tmp_path), 0)
    write_table(events(("user-00", 1, 5, 0, 1)), f"{folder}/file-000000-line-000000000001.parquet")
    bucket = Bucket(0, tuple(bucket_paths(prepared, "histories")[:1]), folder)
    merged, counts = merge_bucket(bucket, prepared, model, Tombstones())
    assert merged.schema.equals(HISTORIES)
    assert merged["user_id"].to_pylist() == ["user-00", "user-01", "user-02", "user-03"]
    assert merged["user"].to_pylist() == [0, 1, 2, 3]
    assert merged["items"].to_pylist()[0][-1] == 1
    assert counts == {"new_users": 0, "users_with_news": 1, "new_interactions": 1, "erased_users": 0}

    class Erased(Tombstones):
        def __len__(self) -> int:
            return 1

        def contains(self, user_ids):
            return np.isin(np.asarray(user_ids, object), ["user-02", "cyd"])

    merged, counts = merge_bucket(bucket, prepared, model, Erased())
    assert merged["user_id"].to_pylist() == ["user-00", "user-01", "user-03"]
    assert counts["erased_users"] == 1

    new = events_of(str(tmp_path), 10)
    write_table(events(("dan", 3, 5, 0, 2), ("cyd", 1, 5, 0, 1)), f"{new}/file-000000-line-000000000001.parquet")
    merged, counts = merge_bucket(Bucket(10, (), new), prepared, model, Erased())
    assert merged.to_pydict() == {"bucket": [10], "user": [-1], "user_id": ["dan"], "items": [[3]]}
    assert (counts["new_users"], counts["erased_users"]) == (2, 1)


def test_a_user_is_never_in_two_buckets(world, tmp_path):
    prepared, model = world
    folder = events_of(str(tmp_path), 0)
    write_table(events(("user-39", 1, 5, 0, 1)), f"{folder}/file-000000-line-000000000001.parquet")
    bucket = Bucket(0, tuple(bucket_paths(prepared, "histories")[:1]), folder)
    with pytest.raises(AssertionError, match="in a bucket that is not its user's"):
        merge_bucket(bucket, prepared, model, Tombstones())


def slowly_merged(known, rows):
    merged = {row["user_id"]: list(dict.fromkeys(row["items"])) for row in known.to_pylist()}
    for user_id, item, *_ in sorted(rows, key=lambda row: row[2:]):
        items = merged.setdefault(user_id, [])
        items += [item] if item not in items else []
    names = known["user_id"].to_pylist()
    return {user_id: merged[user_id] for user_id in [*names, *sorted(merged.keys() - set(names))]}


def test_many_events_are_merged_as_a_slow_reference_does_it():
    random = np.random.default_rng(0)
    histories = Ragged.from_lists([random.integers(0, 90, random.integers(0, 40)) for _ in range(12)])
    known = pa.table(
        {"user": np.arange(12), "user_id": [f"u{user:02d}" for user in range(12)], "items": histories.to_arrow()}
    )
    order = random.permutation(900)  # every file and line once, in no order
    rows = [
        (f"u{random.integers(0, 15):02d}", int(random.integers(0, 90)), int(random.integers(0, 30)), int(one % 7), int(one))
        for one in order
    ]  # fmt: skip
    merged, counts = with_events(known, events(*rows))
    expected = slowly_merged(known, rows)
    assert dict(zip(merged["user_id"].to_pylist(), merged["items"].to_pylist(), strict=True)) == expected
    assert merged["user_id"].to_pylist() == list(expected)
    before = slowly_merged(known, [])
    assert counts == {
        "new_users": 3,
        "users_with_news": sum(len(expected[user_id]) > len(before[user_id]) for user_id in before),
        "new_interactions": sum(map(len, expected.values())) - sum(map(len, before.values())),
    }


def test_a_bucket_is_never_empty_of_files_and_there_are_several_where_there_can_be():
    assert [files_per_bucket(*sizes) for sizes in ((0, 0), (10, 0), (4, 40), (1, 10**6), (100, 10**8))] == [1] * 5
    assert files_per_bucket(100, 0) == 12, "eight buckets or more"


def test_a_bucket_is_in_the_terms_of_an_older_model_and_in_order(world, tmp_path):
    """It knew user-02 and a stranger, and items of other indices."""
    prepared, _ = world
    histories, own = load_histories(prepared), parity_world().catalog
    older = Catalog(["someone", "user-02"], ["ghost", *own.item_ids[::-1][:12]])
    (tmp_path / "model").mkdir()
    older.save(str(tmp_path / "model"))
    folder = events_of(str(tmp_path), 0)
    write_table(events(("user-01", 0, 7, 1, 1)), f"{folder}/file-000001-line-000000000001.parquet")
    write_table(events(("user-01", 12, 5, 0, 1)), f"{folder}/file-000000-line-000000000001.parquet")
    bucket = Bucket(0, tuple(bucket_paths(prepared, "histories")[:1]), folder)
    counts = write_bucket(bucket, prepared, str(tmp_path / "model"), Tombstones(), str(tmp_path / "out"))
    merged = read_tables([str(tmp_path / "out" / bucket_name(0))])
    assert merged["user"].to_pylist() == [-1, -1, 1, -1]
    together = histories.together("train", "validation", "test").tolist()[:4]
    expected = [[older.item_index(own.item_ids[item]) for item in row] for row in together]
    expected = [[item for item in row if item >= 0] for row in expected]
    expected[1] += [12, 0]  # user-01 is odd, item 12 even there, and item 0 nobody's
    assert merged["items"].to_pylist() == expected
    assert counts == {"users": 4, "new_users": 0, "users_with_news": 1, "new_interactions": 2, "erased_users": 0}


def test_the_erased_are_not_counted_among_the_users_of_a_bucket(world, tmp_path):
    prepared, model = world
    bucket = Bucket(3, tuple(bucket_paths(prepared, "histories")[3:4]), "nowhere")
    counts = write_bucket(bucket, prepared, model, Tombstones().with_users(["user-13"]), str(tmp_path))
    assert (counts["users"], counts["erased_users"]) == (3, 1)
    assert len(read_tables([str(tmp_path / bucket_name(3))])) == 3
