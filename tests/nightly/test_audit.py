"""Each promise about the lists, broken once: the audit names it and the users it caught, by hash."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from cllm4rec.arrays.ids import Catalog, IdMap
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.prepared import bucket_name
from cllm4rec.errors import AuditError
from cllm4rec.nightly.audit import audit_bucket, audit_files, hashed
from cllm4rec.scoring.rules import Rules
from cllm4rec.storage.files import write_table
from cllm4rec.storage.table import SCHEMA

CATALOG = Catalog(["ann", "bob", "cyd"], [f"i{item}" for item in range(6)])
SEEN = Ragged.from_lists([[0], [1, 1], [0, 1, 2, 3]])
RULES = Rules(np.array([5]))
GOOD = {
    "ann": (["i1", "i2", "i3"], [3.0, 2.0, 2.0]),
    "bob": (["i0", "i2", "i4"], [0.5, 0.0, -1.0]),
    "cyd": (["i4"], [1.0]),  # nothing else remains
}


def table(lists):
    users, (items, scores) = list(lists), zip(*lists.values(), strict=True)
    return pa.table([users, items, scores, ["2026-11-20"] * len(users), ["m"] * len(users)], schema=SCHEMA)


def audit(*tables, k=3, seen=SEEN, rules=RULES):
    expected = pa.table({"user_id": list(CATALOG.user_ids), "items": seen.to_arrow()})
    return audit_bucket(expected, tables, CATALOG.item_map, rules, k)


def changed(user, items=None, scores=None):
    before = GOOD[user]
    return table({**GOOD, user: (items or before[0], scores or before[1])})


def test_lists_as_promised_pass_in_one_table_or_several():
    assert audit(table(GOOD)) == {"users": 3, "short_lists": 1, "capped_lists": 0}
    parts = [table({user: GOOD[user]}) for user in ("cyd", "ann", "bob")]
    assert audit(*parts) == {"users": 3, "short_lists": 1, "capped_lists": 0}
    assert audit(pa.concat_tables(parts).slice(0, 3)) == {"users": 3, "short_lists": 1, "capped_lists": 0}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (table({user: GOOD[user] for user in ("ann", "cyd")}), "has no list"),
        (pa.concat_tables([table(GOOD), table({"bob": GOOD["bob"]})]), "has more than one list"),
        (table({**GOOD, "dan": GOOD["ann"]}), "is not a user of this run or of this bucket"),
        (changed("bob", ["i0", "i1", "i4"]), "is recommended an item of their history"),
        (changed("bob", ["i0", "i2", "i0"]), "is recommended an item twice"),
        (changed("bob", ["i0", "i2", "i5"]), "is recommended a blocked item"),
        (changed("bob", ["i0", "i2", "ghost"]), "is recommended an item outside the catalog"),
        (changed("bob", scores=[0.5, float("nan"), 0.0]), "has a score that is not finite"),
        (changed("bob", scores=[float("inf"), 1.0, 0.0]), "has a score that is not finite"),
        (changed("bob", scores=[0.5, 0.0, 0.1]), "has scores that are not descending"),
        (changed("bob", ["i0", "i2"], [0.5, 0.0]), "has a list shorter than 3 although more items are allowed"),
        (changed("bob", ["i0", "i2", "i3", "i4"], [4.0, 3.0, 2.0, 1.0]), "has a list longer than 3"),
        (changed("bob", scores=[0.5, 0.0]), "has different numbers of items and scores"),
    ],
)
def test_each_broken_promise_is_refused_with_its_reason(bad, reason):
    with pytest.raises(AuditError, match=rf"each of 1 users {reason} \(hashed ids: [0-9a-f]{{12}}\); nothing was"):
        audit(bad)


def test_an_empty_table_is_refused():
    """What a checkpoint that speaks of other files would make a resumed run write."""
    with pytest.raises(AuditError, match="3 users has no list"):
        audit(table(GOOD).slice(0, 0))
    with pytest.raises(AuditError, match="3 users has no list"):
        audit()


def test_a_row_without_a_user_or_a_list_is_refused():
    loose = pa.schema([field.with_nullable(True) for field in SCHEMA])
    rows = table(GOOD).to_pylist()
    for name, reason in (
        ("user_id", "not a user"),
        ("item_ids", "different numbers"),
        ("scores", "different numbers"),
    ):
        broken = pa.Table.from_pylist([rows[0], {**rows[1], name: None}, rows[2]], schema=loose)
        with pytest.raises(AuditError, match=reason):
            audit(broken)


def test_users_are_named_by_hash_only():
    with pytest.raises(AuditError) as caught:
        audit(table({"ann": GOOD["ann"]}))
    assert hashed("bob") in str(caught.value)
    assert hashed("cyd") in str(caught.value)
    assert "bob" not in str(caught.value)


def test_many_caught_users_are_counted_and_three_named():
    expected = pa.table({"user_id": [f"u{user}" for user in range(50)], "items": [[0]] * 50})
    with pytest.raises(AuditError, match=r"50 users .* \(hashed ids: \w+, \w+, \w+\); "):
        audit_bucket(expected, [], IdMap(["i0", "i1"]), Rules(), 1)


def test_seen_and_blocked_items_are_counted_once():
    overlapping = Rules(np.array([0, 5]))
    with pytest.raises(AuditError, match="1 users has a list shorter than 3"):
        audit(changed("bob", ["i2", "i4"], [0.0, -1.0]), rules=overlapping)
    short = table({**GOOD, "bob": (["i2", "i3", "i4"], [0.0, -1.0, -2.0])})
    assert audit(short, rules=overlapping) == {"users": 3, "short_lists": 1, "capped_lists": 0}


def test_a_user_for_whom_nothing_remains_has_an_empty_list():
    lists = table({"ann": ([], []), "bob": (["i0"], [1.0]), "cyd": (["i0"], [1.0])})
    assert audit(lists, k=1, seen=Ragged.from_lists([range(6), [], []]), rules=Rules()) == {
        "users": 3,
        "short_lists": 1,
        "capped_lists": 0,
    }


def test_a_list_cut_short_by_a_full_category_is_right_and_one_entry_more_is_not():
    capped = Rules(categories=Ragged.from_lists([[0], [0], [0], [0], [1], [1]]), max_per_category=1)
    lists = {"ann": (["i1", "i4"], [2.0, 1.0]), "bob": (["i5", "i0"], [2.0, 1.0]), "cyd": (["i4"], [1.0])}
    assert audit(table(lists), rules=capped) == {"users": 3, "short_lists": 3, "capped_lists": 3}
    with pytest.raises(AuditError, match="more than 1 items of a category"):
        audit(table({**lists, "ann": (["i1", "i4", "i2"], [2.0, 1.0, 0.0])}), rules=capped)
    with pytest.raises(AuditError, match="shorter than 3"):
        audit(table({**lists, "ann": (["i1"], [2.0])}), rules=capped)


def test_a_catalog_smaller_than_k_makes_no_short_lists():
    lists = {"ann": ([f"i{item}" for item in range(6)], [0.0] * 6), "bob": (["i0"], [1.0]), "cyd": (["i5"], [1.0])}
    seen = Ragged.from_lists([[], range(1, 6), range(5)])
    assert audit(table(lists), k=9, seen=seen, rules=Rules()) == {"users": 3, "short_lists": 2, "capped_lists": 0}


@pytest.fixture
def staged(tmp_path):
    """What `audit_files` is given for a bucket of two files."""
    (tmp_path / "model").mkdir()
    CATALOG.save(str(tmp_path / "model"))
    expected = pa.table({"user_id": list(CATALOG.user_ids), "items": SEEN.to_arrow()})
    write_table(expected, str(tmp_path / "histories" / bucket_name(0)))
    write_table(table(GOOD).slice(0, 2), str(tmp_path / "staging" / "one.parquet"))
    write_table(table(GOOD).slice(2), str(tmp_path / "staging" / "two.parquet"))

    def audited(*names):
        folders = (str(tmp_path / name) for name in ("histories", "staging", "model"))
        return audit_files((bucket_name(0), list(names)), *folders, RULES, 3)

    return audited


def test_the_files_of_a_bucket_are_audited_together_and_named_by_their_sha256(staged, tmp_path):
    counts, sha256 = staged("one.parquet", "two.parquet")
    assert counts == {"users": 3, "short_lists": 1, "capped_lists": 0}
    contents = {path.name: path.read_bytes() for path in (tmp_path / "staging").iterdir()}
    assert sha256 == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    with pytest.raises(AuditError, match="1 users has no list"):
        staged("one.parquet")


def test_a_damaged_file_and_one_of_other_columns_are_refused(staged, tmp_path):
    path = tmp_path / "staging" / "two.parquet"
    write_table(table(GOOD).slice(2).drop(["run_date"]), str(path))
    with pytest.raises(AuditError, match=r"two\.parquet has other columns than the table; run the same command with"):
        staged("one.parquet", "two.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AuditError, match=r"two\.parquet is damaged; nothing was published"):
        staged("one.parquet", "two.parquet")
