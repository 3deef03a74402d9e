"""Rules for what may be recommended: files, error messages, and the caps against a slow reference."""

import datetime
import pickle

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.directories import write_prepared, write_random_model

from cllm4rec.arrays.histories import SPLITS
from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import RulesConfig
from cllm4rec.data.world import parity_world
from cllm4rec.errors import DataError
from cllm4rec.scoring import rules as rules_module
from cllm4rec.scoring.recommender import Query, Recommender
from cllm4rec.scoring.rules import RuleBook, Rules, read_rules, rules_digest
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.scoring.user_histories import UserHistories

CATALOG = Catalog([], ["007", "apple", "book", "null", "été"], item_counts=[3, 5, 1, 2, 9])
DAY = datetime.date(2026, 11, 20)

CSV = {
    "deny": "note,item_id\nwhy not,apple\n\n,007\n,ghost\n,apple\n",
    "allow": "item_id\napple\nbook\nété\nghost\n",
    "categories": "item_id,category\napple,fruit\napple,red\nghost,grey\nbook,paper\napple,red\n",
    "availability": "item_id,first_date,last_date\napple,2026-11-20,2026-11-20\nbook,,2026-11-19\n007,2026-11-21,\nghost,,\n",
    "boost": "item_id,boost\napple,0.5\nghost,9\n007,-1e-1\nbook,0\n",
}
YAML = {
    "deny": "- apple\n- 007\n- ghost\n- apple\n",
    "allow": "[apple, book, été, {item_id: ghost}]\n",
    "categories": "- {item_id: apple, category: fruit}\n- {item_id: apple, category: red}\n"
    "- item_id: ghost\n  category: grey\n- {item_id: book, category: paper, more: [1]}\n",
    "availability": "- {item_id: apple, first_date: 2026-11-20, last_date: 2026-11-20}\n"
    "- {item_id: book, first_date: null, last_date: 2026-11-19}\n- item_id: 007\n  first_date: '2026-11-21'\n"
    "  last_date:\n- {item_id: ghost, first_date: ~, last_date: ~}\n",
    "boost": "- {item_id: apple, boost: 0.5}\n- {item_id: ghost, boost: 9}\n- {item_id: 007, boost: -1e-1}\n"
    "- {item_id: book, boost: 0}\n",
}
NOV = [None if day is None else datetime.date(2026, 11, day) for day in (20, None, 21, None)]
PARQUET = {
    "deny": {"item_id": pa.array(["apple", "007", "ghost", "apple"]).dictionary_encode()},
    "allow": {"item_id": pa.array(["apple", "book", "été", "ghost"], pa.large_string())},
    "categories": {"item_id": ["apple", "apple", "ghost", "book"], "category": ["fruit", "red", "grey", "paper"]},
    "availability": {
        "item_id": ["apple", "book", "007", "ghost"],
        "first_date": pa.array(NOV, pa.date32()),
        "last_date": pa.array([NOV[0], datetime.date(2026, 11, 19), None, None], pa.date32()).cast(pa.timestamp("ns")),
    },
    "boost": {"item_id": ["apple", "ghost", "007", "book"], "boost": pa.array([0.5, 9, -0.1, 0], pa.float32())},
}


def written(folder, setting, suffix) -> str:
    path = folder / f"{setting}{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(PARQUET[setting]), path)
    else:
        path.write_bytes((CSV if suffix == ".csv" else YAML)[setting].encode())
    return str(path)


def read(day=DAY, catalog=CATALOG, **settings) -> Rules:
    return read_rules(RulesConfig(**settings), catalog, day)


def refused(tmp_path, setting, content: bytes | str | dict, suffix=".csv", **settings) -> str:
    path = tmp_path / f"file{suffix}"
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read(**{setting: str(path)}, **settings)
    sentence = str(caught.value)
    assert sentence.startswith(f"score.rules.{setting}")
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


# What the files say


def test_no_rules_block_nothing():
    rules = read()
    assert rules.blocked.tolist() == []
    assert (rules.boost_J, rules.categories, rules.max_per_category) == (None, None, None)
    assert sum(rules.counts.values()) == 0


@pytest.mark.parametrize("suffix", [".csv", ".yaml", ".yml", ".parquet"])
def test_every_rule_is_read_from_every_format(tmp_path, suffix):
    def of(setting, **more):
        return read(**{setting: written(tmp_path, setting, suffix)}, **more)

    assert of("deny").blocked.tolist() == [0, 1]
    assert of("allow").blocked.tolist() == [0, 3]
    assert of("availability").blocked.tolist() == [0, 2]
    assert of("boost").boost_J.tolist() == np.float32([-0.1, 0.5, 0, 0, 0]).tolist()
    capped = of("categories", max_per_category=2)
    assert capped.max_per_category == 2
    fruit, red = capped.categories[1]
    assert (fruit != red, capped.categories.lengths.tolist()) == (True, [0, 2, 1, 0, 0])
    assert capped.categories[2].tolist() not in ([fruit], [red])
    assert of("categories").categories is None, "categories without a cap do nothing"


def test_lists_of_items_may_be_plain_text(tmp_path):
    (tmp_path / "deny.txt").write_bytes("\ufeffété\n apple \r\n\napple\nghost\n".encode())
    assert read(deny=str(tmp_path / "deny.txt")).blocked.tolist() == [1, 4]
    (tmp_path / "deny.txt").write_bytes(b"")
    assert read(deny=str(tmp_path / "deny.txt")).blocked.tolist() == []
    assert "must end in one of .parquet, .csv, .yaml, .yml; rename it" in refused(tmp_path, "boost", "apple 1", ".txt")


def test_ids_stay_the_text_they_are_written_as(tmp_path):
    (tmp_path / "deny.yaml").write_text("- 007\n- 'null'\n")
    assert read(deny=str(tmp_path / "deny.yaml")).blocked.tolist() == [0, 3]
    numbers = Catalog([], ["10", "7"])
    pq.write_table(pa.table({"item_id": [7]}), tmp_path / "deny.parquet")
    assert read(catalog=numbers, deny=str(tmp_path / "deny.parquet")).blocked.tolist() == [1]


def test_a_file_may_lie_anywhere_fsspec_reads():
    with fsspec.open("memory://rules/deny.csv", "w") as stream:
        stream.write("item_id\nbook\n")
    assert read(deny="memory://rules/deny.csv").blocked.tolist() == [2]


def test_items_with_too_few_users_in_training_are_blocked():
    assert read(min_support=2).blocked.tolist() == [2]
    assert read(min_support=3).blocked.tolist() == [2, 3]


def test_the_rules_add_up_and_each_is_counted(tmp_path):
    files = {setting: written(tmp_path, setting, ".csv") for setting in CSV}
    (tmp_path / "deny.csv").write_text("item_id\n007\nghost\nghost\n")
    rules = read(**files, max_per_category=1, min_support=2)
    assert rules.blocked.tolist() == [0, 2, 3]
    assert rules.counts == {
        "denied_items": 1,
        "not_allowed_items": 2,
        "low_support_items": 1,
        "unavailable_items": 2,
        "blocked_items": 3,
        "boosted_items": 2,
        "categorized_items": 2,
        "unknown_denied_items": 1,
        "unknown_allowed_items": 1,
        "unknown_categorized_items": 1,
        "unknown_dated_items": 1,
        "unknown_boosted_items": 1,
    }


@pytest.mark.parametrize(
    ("day", "blocked"), [("2026-11-18", [0, 1]), ("2026-11-19", [0, 1]), ("2026-11-20", [0, 2]), ("2026-11-21", [1, 2])]
)
def test_one_reading_serves_every_day_and_both_ends_are_inclusive(tmp_path, day, blocked):
    book = RuleBook.read(RulesConfig(availability=written(tmp_path, "availability", ".csv")), CATALOG)
    rules = book.on(datetime.date.fromisoformat(day))
    assert rules.blocked.tolist() == blocked
    assert rules.counts["unavailable_items"] == len(blocked)


def test_rules_travel_to_other_processes(tmp_path):
    rules = read(categories=written(tmp_path, "categories", ".csv"), max_per_category=1, min_support=2)
    copy = pickle.loads(pickle.dumps(rules))
    assert copy.blocked.tolist() == rules.blocked.tolist()
    assert copy.within_caps(np.array([[1, 2]])).tolist() == [[True, True]]


# The digest


def test_the_digest_changes_with_contents_and_settings_and_not_with_names(tmp_path):
    for name, content in (("a.csv", "item_id\nbook\n"), ("b.csv", "item_id\nbook\n"), ("c.csv", "item_id\napple\n")):
        (tmp_path / name).write_text(content)
    a, b, c = (str(tmp_path / name) for name in ("a.csv", "b.csv", "c.csv"))
    assert rules_digest(RulesConfig(deny=a)) == rules_digest(RulesConfig(deny=b))
    others = [
        RulesConfig(), RulesConfig(deny=a), RulesConfig(deny=c), RulesConfig(allow=a), RulesConfig(min_support=2),
        RulesConfig(categories=a), RulesConfig(categories=a, max_per_category=1),
    ]  # fmt: skip
    assert len({rules_digest(one) for one in others}) == len(others)
    with pytest.raises(DataError, match=r"score\.rules\.deny names .*nothing\.csv, which does not exist"):
        rules_digest(RulesConfig(deny=str(tmp_path / "nothing.csv")))


# Refusals


@pytest.mark.parametrize("setting", CSV)
def test_a_file_that_is_not_there_is_told_with_its_setting(tmp_path, setting):
    with pytest.raises(DataError, match=rf"score\.rules\.{setting} names .*nothing\.csv, which does not exist; corr"):
        read(**{setting: str(tmp_path / "nothing.csv")})


def test_a_file_that_cannot_be_opened_is_told_with_the_reason(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"score\.rules\.deny names .*folder\.csv, which cannot be read"):
        read(deny=str(tmp_path / "folder.csv"))
    with pytest.raises(DataError, match="which cannot be read"):
        read(deny="nosuchprotocol://bucket/deny.csv")


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ("item,boost\na,1\n", ".csv", "no column item_id (its columns: 'item', 'boost'); it needs item_id, boost"),
        ("item_id, boost\na,1\n", ".csv", "no column boost (its columns: 'item_id', ' boost')"),
        ("item_id,boost,boost\na,1,2\n", ".csv", "more than one column boost"),
        ("", ".csv", "no column item_id (its columns: none)"),
        ({"item_id": ["a"]}, ".parquet", "no column boost"),
        ("- {item_id: a}\n", ".yaml", "the entry of line 1 has no boost"),
        ("- {item_id: a, boost: 1}\n- a\n", ".yaml", "the entry of line 2 has no item_id and no boost"),
        ("- {item_id: a, boost: [1]}\n", ".yaml", "the entry of line 1 has no boost"),
    ],
)
def test_a_missing_column_is_named_with_those_found(tmp_path, content, suffix, message):
    assert message in refused(tmp_path, "boost", content, suffix)


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (b"item_id\nbook\n\xff\xfe\n", ".csv", "line 3 is not UTF-8"),
        (b"- book\n- \xe9t\xe9\n", ".yaml", "line 2 is not UTF-8"),
        (b"\xff\xfeb\x00", ".txt", "line 1 is not UTF-8"),
        (b"item_id\nbook,2\n", ".csv", "line 2 has 2 values for 1 columns"),
        (b'item_id\nbook\n"open\n', ".csv", "line 3 is not CSV"),
        (b"book\n", ".yaml", "it is not a YAML list"),
        (b"", ".yaml", "it is not a YAML list"),
        (b"- book\n- [\n", ".yaml", "is not YAML"),
        (b"- !!python/object/apply:os.system [true]\n", ".yaml", "the entry of line 1 has no item_id"),
        (b"PAR1 and then nothing", ".parquet", "it is not Parquet or is damaged"),
        (b"item_id\nbook\n", ".tsv", "must end in one of .parquet, .csv, .yaml, .yml, .txt; rename it"),
        (b"note,item_id\nx,book\nx,\n", ".csv", "line 3 has no item_id"),
        (b"- book\n-\n", ".yaml", "line 2 has no item_id"),
        ({"item_id": ["book", None]}, ".parquet", "row 2 has no item_id"),
        ({"item_id": [7.0]}, ".parquet", "its column item_id holds floating-point numbers"),
        ({"item_id": [["book"]]}, ".parquet", "its column item_id holds list"),
        ({"item_id": pa.array([b"book", b"\xff"])}, ".parquet", "its column item_id holds text that is not UTF-8"),
    ],
)
def test_a_damaged_file_is_refused_with_the_line(tmp_path, content, suffix, message):
    assert message in refused(tmp_path, "deny", content, suffix)


@pytest.mark.parametrize("boost", ["", "much", "nan", "inf", "-inf", "1e39", "0,5"])
def test_a_boost_is_a_finite_number(tmp_path, boost):
    message = refused(tmp_path, "boost", f'item_id,boost\nghost,1\n\napple,"{boost}"\n')
    assert message.endswith(f"line 4 has the boost {boost!r}; write a finite number" if boost else "remove the row")


@pytest.mark.parametrize("day", ["soon", "2026-13-01", "20.11.2026", "2026-11-20T00:00:00"])
@pytest.mark.parametrize("column", ["first_date", "last_date"])
def test_a_date_is_a_date(tmp_path, day, column):
    other = {"first_date": "last_date", "last_date": "first_date"}[column]
    message = refused(tmp_path, "availability", f"item_id,{column},{other}\napple,{day},\n")
    assert f"line 2 has the {column} {day!r}; write a date as YYYY-MM-DD or leave it empty" in message


def test_dates_that_are_times_or_in_the_wrong_order_are_refused(tmp_path):
    message = refused(tmp_path, "availability", "item_id,first_date,last_date\nghost,2026-11-21,2026-11-20\n")
    assert "line 2 has a first_date after its last_date; swap them" in message
    times = {"item_id": ["book"], "first_date": [datetime.datetime(2026, 11, 20, 12)], "last_date": [DAY]}
    assert "row 1 has the first_date '2026-11-20 12:00:00.000000'; write a date" in refused(
        tmp_path, "availability", times, ".parquet"
    )


@pytest.mark.parametrize(
    ("setting", "content"),
    [
        ("boost", "item_id,boost\napple,1\nghost,1\nghost,1\n"),
        ("availability", "item_id,first_date,last_date\napple,,\nghost,,\nghost,,\n"),
    ],
)
def test_an_item_stands_once_where_two_rows_could_contradict(tmp_path, setting, content):
    message = refused(tmp_path, setting, content)
    assert "line 4 repeats the item 'ghost' of line 3; keep one" in message


def test_a_category_has_a_name(tmp_path):
    assert "line 2 has no category" in refused(tmp_path, "categories", "item_id,category\napple,\n", max_per_category=1)


def test_rules_that_leave_nothing_are_refused(tmp_path):
    assert "holds no item of the catalog" in refused(tmp_path, "allow", "item_id\nghost\n")
    with pytest.raises(DataError, match=r"leaves none of 5 items to recommend on 2026-11-20 \(low_support_items 5,"):
        read(min_support=10)


# Caps


def greedy(candidates, categories, most, k=None):
    """The slow, obvious reference: take the next best item unless one of its categories is full."""
    taken, num_of = [], {}
    for item in candidates:
        if item >= 0 and len(taken) != k and all(num_of.get(code, 0) < most for code in categories[item]):
            taken.append(item)
            for code in categories[item]:
                num_of[code] = num_of.get(code, 0) + 1
    return taken


NUM_ITEMS = 12
categories_of_items = st.lists(
    st.lists(st.integers(0, 4), max_size=3, unique=True).map(sorted), min_size=NUM_ITEMS, max_size=NUM_ITEMS
)
rankings = st.lists(
    st.permutations([*range(NUM_ITEMS), -1, -2]).map(lambda row: [max(item, -1) for item in row]),
    min_size=1,
    max_size=5,
)
capped = st.builds(
    lambda rows, most, blocked: Rules(np.unique(blocked).astype(np.int64), None, Ragged.from_lists(rows), most),
    categories_of_items,
    st.integers(1, 3),
    st.lists(st.integers(0, NUM_ITEMS - 1), max_size=3),
)


@given(rankings, capped)
def test_caps_take_what_the_slow_reference_takes(candidates, rules):
    keep = rules.within_caps(np.array(candidates))
    lists = rules.categories.tolist()
    for row, kept in zip(candidates, keep.tolist(), strict=True):
        taken = [item for item, is_kept in zip(row, kept, strict=True) if is_kept]
        assert taken == greedy(row, lists, rules.max_per_category)


@given(rankings, capped, st.integers(0, NUM_ITEMS))
def test_a_breach_is_found_and_nothing_else_is(candidates, rules, length):
    items = [[item for item in row if item >= 0][:length] for row in candidates]
    found = rules.violations(Ragged.from_lists(items))
    assert list(found) == ["a blocked item", f"more than {rules.max_per_category} items of a category"]
    is_blocked, is_over = (Ragged(flags, Ragged.from_lists(items).offsets).tolist() for flags in found.values())
    for row, blocked, over in zip(items, is_blocked, is_over, strict=True):
        assert blocked == [item in rules.blocked for item in row]
        codes = [rules.categories[item].tolist() for item in row]
        for place, own in enumerate(codes):
            before = [sum(code in earlier for earlier in codes[:place]) for code in own]
            assert over[place] == any(num >= rules.max_per_category for num in before)


@given(rankings, capped, st.integers(1, NUM_ITEMS), st.sets(st.integers(0, NUM_ITEMS - 1)), st.integers(1, 30))
def test_a_list_allows_no_further_item_if_and_only_if_nothing_more_fits(candidates, rules, k, seen, cells):
    closed = seen | set(rules.blocked.tolist())
    lists = rules.categories.tolist()
    whole = [greedy([j for j in row if j not in closed], lists, rules.max_per_category, k) for row in candidates]
    seen_rows = Ragged.from_lists([sorted(seen)] * len(whole))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules_module, "_ALLOWED_CELLS", cells)  # any number of users at a time
        num_allowed = rules.num_allowed(Ragged.from_lists(whole), seen_rows, NUM_ITEMS)
    cap = rules.max_per_category
    for row, num in zip(whole, num_allowed.tolist(), strict=True):
        fits = [j for j in set(range(NUM_ITEMS)) - closed - set(row) if j in greedy([*row, j], lists, cap)]
        assert num == len(fits)
        assert len(row) == k or num == 0


def test_without_caps_every_item_that_is_left_is_allowed():
    rules = Rules(np.array([0, 3]))
    num_allowed = rules.num_allowed(Ragged.from_lists([[1], [], [1, 2, 4]]), Ragged.from_lists([[0, 2], [], [0]]), 5)
    assert num_allowed.tolist() == [1, 3, 0]
    assert rules.within_caps(np.array([[1, -1]])).tolist() == [[True, False]]
    assert list(rules.violations(Ragged.from_lists([[1]]))) == ["a blocked item"]


# Nightly job and endpoint


def test_the_recommender_follows_the_rules_of_the_nightly_job_from_day_to_day(tmp_path):
    prepared_dir = write_prepared(tmp_path / "prepared")
    model_dir = write_random_model(tmp_path / "run", prepared_dir, seed=0)
    world = parity_world()
    user_ids, item_ids = world.catalog.user_ids, world.catalog.item_ids
    seen = world.histories.together(*SPLITS)
    boosted, leaving = (int(item) for item in np.setdiff1d(np.arange(world.num_items), seen[0])[-2:])
    (tmp_path / "boost.csv").write_text(f"item_id,boost\n{item_ids[boosted]},1000\n{item_ids[leaving]},2000\n")
    (tmp_path / "dates.csv").write_text(f"item_id,first_date,last_date\n{item_ids[leaving]},,{DAY}\n")
    config = RulesConfig(boost=str(tmp_path / "boost.csv"), availability=str(tmp_path / "dates.csv"))

    scorer, today = Scorer.load(model_dir), [DAY]
    histories, book = UserHistories.load(prepared_dir, scorer.catalog), RuleBook.read(config, scorer.catalog)
    recommender = Recommender(scorer, histories, book, today=lambda: today[0])
    plain = scorer.top_k([0], seen.take(np.array([0])), 20)[0][0].tolist()
    assert plain[0] not in (boosted, leaving)
    for day, first in ((DAY, leaving), (DAY + datetime.timedelta(1), boosted)):
        today[0] = day
        rules = read_rules(config, scorer.catalog, day)
        items, scores = scorer.top_k([0], seen.take(np.array([0])), 20, rules)
        answer = recommender.answer([Query(user_id=user_ids[0], k=20)])[0]
        assert [item.item_id for item in answer.items] == item_ids[items[0, items[0] >= 0]].tolist()
        assert [item.score for item in answer.items] == scores[0, items[0] >= 0].tolist()
        assert items[0, 0] == first
