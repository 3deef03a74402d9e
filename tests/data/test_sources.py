"""Formats, validation and what is refused; no Ray."""

import bz2
import gzip
import json
import lzma
import tarfile
import tracemalloc
import uuid
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from hypothesis import given
from hypothesis import strategies as st

from cllm4rec.config import Columns, Source, parse_config
from cllm4rec.data import records, times, values
from cllm4rec.data.formats import Layout, Role
from cllm4rec.data.records import Limits, parse_records, read_records
from cllm4rec.data.sources import inspect
from cllm4rec.errors import ConfigError, DataError

LIMITS = Limits(max_line_bytes=1000, max_id_chars=36)
OWN_COLUMNS = Columns(user="reader", item="book", rating="stars", text="note", timestamp="when")
FACTS = [("anna", "b1", 5.0, 1000, "so good"), ("ben", "b2", 2.0, 2000, "not, for me")]


def rows_of(layout: Layout, limits: Limits = LIMITS) -> list[dict[str, Any]]:
    tables = [
        parse_records(table, layout, limits) for file in layout.files for table in read_records(file, layout, limits)
    ]
    return pa.concat_tables(tables).to_pylist() if tables else []


def read(
    path: Path, format: Any = "jsonl", columns: Columns = OWN_COLUMNS, role: Role = "interactions", rated: bool = True
) -> list[dict[str, Any]]:
    return rows_of(inspect(Source(path=str(path), format=format, columns=columns), role, 3.0 if rated else None))


def facts_of(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    assert all(row["reason"] is None for row in rows)
    return [(row["user"], row["item"], row["rating"], row["time"], row["text"]) for row in rows]


def json_lines(names: str, times: list[Any]) -> str:
    keys = names.split()
    rows = [(*fact[:3], fact[4], time) for fact, time in zip(FACTS, times, strict=True)]
    return "".join(json.dumps(dict(zip(keys, row, strict=True)) | {"extra": [1]}) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("format", "content", "columns"),
    [
        ("amazon2014", json_lines("reviewerID asin overall reviewText unixReviewTime", [1000, 2000]), Columns()),
        ("amazon2018", json_lines("reviewerID asin overall reviewText unixReviewTime", [1000, 2000]), Columns()),
        ("amazon2023", json_lines("user_id parent_asin rating text timestamp", [1_000_123, 2_000_999]), Columns()),
        (
            "yelp",
            json_lines("user_id business_id stars text date", ["1970-01-01 00:16:40", "1970-01-01 00:33:20"]),
            Columns(),
        ),
        ("jsonl", json_lines("reader book stars note when", [1000, 2000]), OWN_COLUMNS),
        (
            "csv",
            'book,reader,stars,when,note\r\nb1,anna,5,1000,so good\r\nb2,ben,2,2000,"not, for me"\r\n',
            OWN_COLUMNS,
        ),
        (
            "tsv",
            "book\treader\tstars\twhen\tnote\nb1\tanna\t5\t1000\tso good\nb2\tben\t2\t2000\tnot, for me\n",
            OWN_COLUMNS,
        ),
        (
            "recbole",
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\tnote:token_seq\n"
            "anna\tb1\t5\t1000\tso good\nben\tb2\t2.0\t2E3\tnot, for me\n",
            Columns(text="note"),
        ),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_text_format_gives_the_same_rows(
    tmp_path: Path, format: str, content: str, columns: Columns, packed: bool
) -> None:
    path = tmp_path / ("rows.txt.gz" if packed else "rows.txt")
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    assert facts_of(read(path, format, columns)) == FACTS


def test_parquet_gives_the_same_rows_with_row_numbers(tmp_path: Path) -> None:
    names = ("reader", "book", "stars", "when", "note")
    many = FACTS * 1500
    pq.write_table(
        pa.table({name: [fact[place] for fact in many] for place, name in enumerate(names)}), tmp_path / "a.parquet"
    )
    rows = read(tmp_path / "a.parquet", "parquet")
    assert facts_of(rows) == many
    assert [row["line"] for row in rows] == list(range(1, 3001))


def parquet_rows(path: Path, **changed: Any) -> list[dict[str, Any]]:
    """What is read from a Parquet file of two rows with other columns."""
    columns = {"reader": ["anna", "ben"], "book": ["b1", "b2"], "stars": [5.0, 2.0], "when": [1000, 2000]}
    pq.write_table(pa.table(columns | changed), path / "a.parquet")
    return read(path / "a.parquet", "parquet", OWN_COLUMNS.model_copy(update={"text": None}))


UUIDS = [f"{number:08d}-0000-0000-0000-000000000000" for number in (1, 2)]
UUID_BYTES = pa.array([uuid.UUID(text).bytes for text in UUIDS], pa.binary(16))


@pytest.mark.parametrize(
    ("column", "ids"),
    [
        (pa.array([1.0, 2.0]), ["1", "2"]),
        (pa.array([Decimal("1.00"), Decimal("20.00")]), ["1", "20"]),
        (pa.array([b"anna", "zoë".encode()]), ["anna", "zoë"]),
        (pa.array([" anna", "ben\t"]), ["anna", "ben"]),
        (pa.array(["anna", "anna"]).dictionary_encode(), ["anna", "anna"]),
        (pa.ExtensionArray.from_storage(pa.uuid(), UUID_BYTES), UUIDS),
    ],
)
def test_ids_of_parquet_may_have_any_type_that_names_something(tmp_path: Path, column: Any, ids: list[str]) -> None:
    rows = parquet_rows(tmp_path, reader=column)
    assert [row["user"] for row in rows] == ids
    assert [row["reason"] for row in rows] == [None, None]


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([1.5, 2.0]), values.NO_USER),
        (pa.array([float("nan"), 2.0]), values.NO_USER),
        (pa.array([2.0**60, 2.0]), values.NO_USER),
        (pa.array([None, 2.0]), values.NO_USER),
        (pa.array([b"\xff", b"2"]), values.NOT_UTF8),
        (pa.array([b"\xff", b"2"]).view(pa.string()), values.NOT_UTF8),
        (pa.array([["a"], ["b"]]).slice(0, 1), values.NO_USER),
    ],
)
def test_ids_of_parquet_that_name_nothing_are_refused_row_by_row(tmp_path: Path, column: Any, reason: str) -> None:
    column = column if len(column) == 2 else pa.concat_arrays([column, pa.nulls(1, column.type)])
    rows = parquet_rows(tmp_path, reader=column)
    assert rows[0]["reason"] == reason


def test_a_time_of_parquet_that_no_calendar_has_costs_its_own_row(tmp_path: Path) -> None:
    for kind in (pa.timestamp("ms"), pa.date64()):
        far, good = parquet_rows(
            tmp_path, when=pa.array([10**17 // 86_400_000 * 86_400_000, 86_400_000], pa.int64()).cast(kind)
        )
        assert (far["reason"], good["time"]) == (times.FAR_TIME, 86_400)
    far, good = parquet_rows(tmp_path, when=pa.array([10**8, 1], pa.int32()).view(pa.date32()))
    assert (far["reason"], good["time"]) == (times.FAR_TIME, 86_400)


def test_a_value_of_parquet_that_python_cannot_hold_costs_its_own_row(tmp_path: Path) -> None:
    seen = pa.array([10**17, 0], pa.timestamp("ms"))
    pq.write_table(pa.table({"book": ["b1", "b2"], "seen": seen}), tmp_path / "a.parquet")
    bad, good = read(tmp_path / "a.parquet", "parquet", Columns(item="book", text="seen"), "items")
    assert (bad["reason"], good["text"]) == (records.UNREADABLE, "1970-01-01 00:00:00")


def test_a_row_without_a_time_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("reader,book,stars,note,when\nanna,b1,5,so good,\nben,b2,2,bad,7\n")
    assert [(row["time"], row["reason"]) for row in read(tmp_path / "a.csv", "csv")] == [(0, None), (7, None)]
    (tmp_path / "a.jsonl").write_text(
        '{"reader": "anna", "book": "b1", "stars": 5}\n{"reader": "ben", "when": null, "note": ""}\n'
    )
    assert [row["time"] for row in read(tmp_path / "a.jsonl")] == [0, None]


def test_the_unit_and_format_of_times_are_settings_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("reader,book,when\nanna,b1,1580461507000\n")
    columns = OWN_COLUMNS.model_copy(update={"text": None, "rating": None})
    source = Source(path=str(tmp_path / "a.csv"), format="csv", columns=columns)
    (row,) = rows_of(inspect(source, "interactions", None))
    assert row["reason"] == times.FAR_TIME
    (row,) = rows_of(inspect(source.model_copy(update={"time_unit": "ms"}), "interactions", None))
    assert row["time"] == 1580461507
    (tmp_path / "a.csv").write_text("reader,book,when\nanna,b1,01/02/2020\n")
    (row,) = rows_of(inspect(source.model_copy(update={"time_format": "%d/%m/%Y"}), "interactions", None))
    assert row["time"] == 1580515200


@pytest.mark.parametrize("content", ["196\t242\t3\t881250949\n", "196::242::3::881250949\n"])
def test_movielens_needs_no_header_and_has_two_delimiters(tmp_path: Path, content: str) -> None:
    (tmp_path / "u.data").write_text(content)
    assert facts_of(read(tmp_path / "u.data", "movielens", Columns())) == [("196", "242", 3.0, 881250949, "")]


def test_movielens_titles_are_latin_1(tmp_path: Path) -> None:
    (tmp_path / "movies.dat").write_bytes("7::Café Noir (1990)::Drama|Comedy\n".encode("latin-1"))
    (row,) = read(tmp_path / "movies.dat", "movielens", Columns(), "items")
    assert (row["item"], row["text"]) == ("7", "Café Noir (1990) Drama|Comedy")


def test_amazon_metadata_of_2014_are_python_dictionaries(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text("{'asin': '0001', 'title': \"Player's\", 'description': 'x'}\n{'asin': [[[\n")
    good, bad = read(tmp_path / "meta.json", "amazon2014", Columns(), "items")
    assert (good["item"], good["text"]) == ("0001", "Player's x")
    assert bad["reason"] == records.NOT_JSON


def test_several_text_columns_are_joined_in_order_lists_and_gaps_included(tmp_path: Path) -> None:
    items = [
        {"book": 7, "title": "One", "shelves": ["Fiction", ["Crime", "Noir"]], "blurb": "Dark."},
        {"book": "8", "title": None, "shelves": [], "blurb": " Light. "},
    ]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    rows = read(
        tmp_path / "books.jsonl", columns=Columns(item="book", text=["title", "shelves", "blurb"]), role="items"
    )
    assert [(row["item"], row["text"]) for row in rows] == [("7", "One Fiction Crime Noir Dark."), ("8", "Light.")]


def test_ratings_are_not_looked_at_where_there_is_no_threshold(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"reader": "anna", "book": "b1", "stars": "many"}\n')
    (row,) = read(tmp_path / "a.jsonl", columns=Columns(user="reader", item="book", rating="stars"), rated=False)
    assert (row["user"], row["rating"], row["reason"]) == ("anna", None, None)


GOOD = {"reader": "anna", "book": "b1", "stars": 5, "note": "fine", "when": 3}
ZOO: list[tuple[bytes, str]] = [
    (b'{"reader": "anna", ', records.NOT_JSON),
    (b"[1, 2]", records.NOT_JSON),
    (b'{"a": ' * 5000 + b"1" + b"}" * 5000, records.TOO_LONG),
    (b"[" * 900, records.NOT_JSON),
    (b'{"reader": "\xff\xfe"}', values.NOT_UTF8),
    (b'{"reader": "a\x00b"}', values.NUL),
    (b'{"reader": "a\\u0000b", "book": "b1", "stars": 5, "when": 3}', values.NUL),
    (b'{"reader": "anna", "book": "b1", "stars": 5, "when": 3, "note": "\\ud800"}', values.BAD_UNICODE),
    (
        b'{"reader": "anna", "book": "b1", "stars": 5, "when": 3, "note": ' + b"[" * 50 + b"]" * 50 + b"}",
        values.TOO_DEEP,
    ),
]
ZOO += [
    (json.dumps(GOOD | change).encode(), reason)
    for change, reason in [
        ({"reader": ""}, values.NO_USER),
        ({"reader": "  "}, values.NO_USER),
        ({"reader": None}, values.NO_USER),
        ({"reader": True}, values.NO_USER),
        ({"reader": 1.5}, values.NO_USER),
        ({"reader": "u" * 37}, values.LONG_USER),
        ({"book": ["b1"]}, values.NO_ITEM),
        ({"book": 10**40}, values.LONG_ITEM),
        ({"stars": "five"}, values.BAD_RATING),
        ({"stars": None}, values.BAD_RATING),
        ({"stars": float("nan")}, values.BAD_RATING),
        ({"stars": float("inf")}, values.BAD_RATING),
        ({"stars": "1_0"}, values.BAD_RATING),
        ({"stars": True}, values.BAD_RATING),
        ({"stars": 10**400}, values.BAD_RATING),
        ({"when": "yesterday"}, times.BAD_TIME),
        ({"when": "2020-13-01"}, times.BAD_TIME),
        ({"when": True}, times.BAD_TIME),
        ({"when": 1e300}, times.FAR_TIME),
        ({"note": "x" * 2000}, records.TOO_LONG),
    ]
]


@pytest.mark.parametrize(("line", "reason"), ZOO)
def test_a_bad_line_is_refused_with_its_reason_and_nothing_else_of_it(tmp_path: Path, line: bytes, reason: str) -> None:
    good = json.dumps(GOOD).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, line, b"", good]) + b"\n")
    first, refused, last = read(tmp_path / "a.jsonl")
    assert (first["reason"], last["reason"]) == (None, None)
    assert refused == dict.fromkeys(refused) | {"line": 2, "reason": reason}
    assert last["line"] == 4, "blank lines are no rows, but lines"


@given(st.lists(st.binary(max_size=60), max_size=12), st.sampled_from(["amazon2014", "csv", "tsv"]))
def test_every_line_of_any_bytes_is_counted(lines: list[bytes], format: str) -> None:
    """Rows in = rows good + rows refused, whatever the bytes. (Quotes are left out: in csv they join lines.)"""
    first = {"amazon2014": b"{}", "csv": b"a,b,c", "tsv": b"a\tb\tc"}[format]
    lines = [line.replace(b"\n", b"").replace(b'"', b"") for line in lines]
    with fsspec.open("memory://any.txt", "wb") as stream:
        stream.write(b"\n".join([first, *lines]))
    has_header = format != "amazon2014"
    columns, names = Columns(user="a", item="b"), ("a", "b", "c") if has_header else ()
    layout = Layout("interactions", ("memory://any.txt",), format, columns, "," if format == "csv" else "\t", names)
    rows = rows_of(layout)
    assert len(rows) == sum(bool(line.rstrip(b"\r")) for line in lines) + (not has_header)
    assert all(row["reason"] is not None or (row["user"] and row["item"]) for row in rows)


def test_a_gzip_bomb_is_refused_in_little_memory(tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as stream:
        stream.write(good + b"\n")
        for _ in range(100):
            stream.write(b"a" * (1 << 20))
        stream.write(b"\n" + good)
    layout = inspect(Source(path=str(tmp_path / "a.jsonl.gz"), columns=OWN_COLUMNS), "interactions", 3.0)
    tracemalloc.start()
    rows = rows_of(layout)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row["reason"] for row in rows] == [None, records.TOO_LONG, None]
    assert peak < 20 << 20


def test_a_quoted_field_may_go_over_lines_and_hold_quotes_and_delimiters(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'reader,book,stars,when,note\nanna,b1,5,1,"two\nlines, ""quoted""\nthree"\nben,b2,4,2,5" tape\ncleo,b3,4,3,x\n'
    )
    rows = read(tmp_path / "a.csv", "csv")
    assert [(row["user"], row["line"], row["text"]) for row in rows] == [
        ("anna", 2, 'two\nlines, "quoted"\nthree'),
        ("ben", 5, '5" tape'),
        ("cleo", 6, "x"),
    ]


def test_a_quote_that_is_never_closed_costs_its_own_lines_one_by_one(tmp_path: Path) -> None:
    lines = "".join(f"user{number},b1,4,3,fine\n" for number in range(200))
    (tmp_path / "a.csv").write_text(f'reader,book,stars,when,note\nanna,b1,5,1,"open\n{lines}')
    rows = read(tmp_path / "a.csv", "csv")
    assert len(rows) == 201
    refused = [row for row in rows if row["reason"]]
    assert {row["reason"] for row in refused} == {records.NOT_CSV}
    assert sum(len(f"user{number},b1,4,3,fine") for number in range(len(refused))) < LIMITS.max_line_bytes + 50


def test_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfreader,book,stars,when,note\r\nanna,b1,5,1,x\r\n")
    assert facts_of(read(tmp_path / "a.csv", "csv")) == [("anna", "b1", 5.0, 1, "x")]


def test_a_short_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("reader,book,stars,when,note\nanna,b1,5\n")
    assert read(tmp_path / "a.csv", "csv")[0]["reason"] == records.COLUMN_COUNT


def test_globs_and_lists_name_every_file_once_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        (tmp_path / name).write_text(json.dumps(GOOD) + "\n")
    paths = [str(tmp_path / "c.jsonl"), str(tmp_path / "[ab].jsonl"), f"file://{tmp_path}/a.jsonl"]
    layout = inspect(Source(path=paths, columns=OWN_COLUMNS), "interactions", 3.0)
    assert layout.file_labels == ["c.jsonl", "a.jsonl", "b.jsonl"]


def complaint(tmp_path: Path, content: str | bytes | None, name: str = "notes.jsonl", **source: Any) -> str:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    settings = {"path": str(path), "columns": OWN_COLUMNS} | source
    with pytest.raises((DataError, ConfigError)) as caught:
        rows_of(inspect(Source(**settings), "interactions", 3.0))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_thing_that_does_not_fit_is_named_in_one_sentence(tmp_path: Path) -> None:
    assert "does not exist" in complaint(tmp_path, None)
    assert "matches no file" in complaint(tmp_path, None, path=str(tmp_path / "*.nothing"))
    assert "is a folder" in complaint(tmp_path, None, path=str(tmp_path))
    assert "empty list" in complaint(tmp_path, None, path=[])
    assert "holds no rows" in complaint(tmp_path, "\n\n")
    assert "holds a header and no rows" in complaint(tmp_path, "user,item,rating,text,timestamp\n", format="csv")
    assert "column 'reader' not found in notes.jsonl; it has: user, book" in complaint(
        tmp_path, '{"user": 1, "book": 2}'
    )
    assert "column 'when' not found" in complaint(tmp_path, '{"reader": 1, "book": 2, "stars": 3, "note": ""}')
    unrated = '{"reader": 1, "book": 2, "note": "", "when": 4}'
    assert "or set data.min_rating to null" in complaint(tmp_path, unrated)
    assert "is not of format jsonl" in complaint(tmp_path, "reader,book\n1,2\n")
    assert "column 'reader' not found in notes.csv" in complaint(tmp_path, "a;b\n1;2\n", "notes.csv", format="csv")
    assert "not of format movielens" in complaint(tmp_path, "1,2,3,4\n", format="movielens", columns=Columns())
    assert "header is not typed" in complaint(tmp_path, "user_id\titem_id\n1\t2\n", format="recbole", columns=Columns())
    assert "is not a parquet file" in complaint(tmp_path, "reader,book\n1,2\n", format="parquet")
    assert "does not say which column of data.interactions is the user" in complaint(
        tmp_path, "{}\n", columns=Columns()
    )
    assert "set data.min_rating to null" in complaint(tmp_path, "{}\n", columns=Columns(user="reader", item="book"))


def test_a_column_that_stands_twice_is_refused_if_it_is_read(tmp_path: Path) -> None:
    header = "reader,book,stars,stars,note,when"
    said = complaint(tmp_path, f"{header}\n1,2,3,4,x,5\n", "twice.csv", format="csv")
    assert "column 'stars' stands 2 times in twice.csv (data.interactions)" in said
    said = complaint(tmp_path, f"{header}\n1,2,3,4,x,5\n".replace(",", "\t"), "twice.tsv", format="tsv")
    assert "column 'stars' stands 2 times" in said
    pq.write_table(pa.table([[1], [2], [3], [4], [5], [6]], names=header.split(",")), tmp_path / "twice.parquet")
    assert "column 'stars' stands 2 times" in complaint(tmp_path, None, "twice.parquet", format="parquet")
    (tmp_path / "a.csv").write_text("reader,book,stars,note,when,,\n1,2,3,x,5,,\n")
    assert facts_of(read(tmp_path / "a.csv", "csv")) == [("1", "2", 3.0, 5, "x")]


def test_files_of_one_source_must_have_one_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("reader,book,stars,note,when\n1,2,3,x,4\n")
    (tmp_path / "b.csv").write_text("book,reader,stars,note,when\n1,2,3,x,4\n")
    assert "b.csv has the columns book, reader" in complaint(tmp_path, None, path=str(tmp_path / "*.csv"), format="csv")


def test_items_without_any_of_their_text_columns_are_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "items.json").write_text('{"asin": "b1", "brand": "x"}\n')
    with pytest.raises(DataError, match="column 'title' not found"):
        inspect(Source(path=str(tmp_path / "items.json"), format="amazon2014"), "items", 3.0)
    with pytest.raises(ConfigError, match="is the text"):
        inspect(Source(path=str(tmp_path / "items.json"), format="recbole"), "items", 3.0)


def test_a_built_in_format_does_without_text_and_time(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"reviewerID": "anna", "asin": "b1", "overall": 5}\n')
    assert facts_of(read(tmp_path / "a.json", "amazon2014", Columns())) == [("anna", "b1", 5.0, 0, "")]


def test_a_delta_table_is_its_newest_rows_wherever_it_lies(tmp_path):
    uri = str(tmp_path / "a b" / "events")
    rows = pa.table({"reader": ["u", "v"], "book": ["i", "j"]})
    write_deltalake(uri, rows)
    write_deltalake(uri, rows.slice(0, 1), mode="overwrite")
    columns = {"user": "reader", "item": "book"}
    layout = inspect(Source(path=uri, format="delta", columns=Columns(**columns)), "interactions", None)
    assert [row["user"] for row in rows_of(layout)] == ["u"]


def test_a_delta_table_that_cannot_be_read_is_refused(tmp_path):
    source = Source(path=str(tmp_path / "nothing"), format="delta", columns=Columns(user="reader", item="book"))
    with pytest.raises(DataError, match="cannot be read as a Delta table"):
        inspect(source, "interactions", None)


PARTED = pa.table({"reader": ["u", "v", "w"], "book": ["07", "a/b=c d", "x"], "when": [1000, 2000, None]})


def test_columns_in_the_names_of_folders_are_read_too(tmp_path):
    """As Delta, Hive and Spark write partitions; numbers keep their zeros."""
    columns = Columns(user="reader", item="book", timestamp="when")
    expected = {("u", "07", 1000), ("v", "a/b=c d", 2000), ("w", "x", 0)}
    write_deltalake(str(tmp_path / "delta"), PARTED, partition_by=["book", "when"])
    pads.write_dataset(
        PARTED, tmp_path / "hive", format="parquet", partitioning=["book", "when"], partitioning_flavor="hive"
    )
    (tmp_path / "hive" / "_SUCCESS").write_text("")
    for form, path in (("delta", "delta"), ("parquet", "hive"), ("parquet", "hive/**/*.parquet")):
        source = Source(path=str(tmp_path / path), format=form, columns=columns)
        rows = rows_of(inspect(source, "interactions", None))
        assert {(row["user"], row["item"], row["time"]) for row in rows} == expected, path


def test_a_folder_without_parquet_files_is_named(tmp_path):
    (tmp_path / "_SUCCESS").write_text("")
    assert "is a folder without files" in complaint(tmp_path, None, path=str(tmp_path), format="parquet")


def one_row(path: str, format: Any = "csv", **settings: Any) -> tuple[Any, ...]:
    source = Source(path=path, format=format, columns=OWN_COLUMNS, **settings)
    (row,) = facts_of(rows_of(inspect(source, "interactions", 3.0)))
    return row


LINES = b"reader,book,stars,note,when\nanna,b1,5,so good,1000\n"


@pytest.mark.parametrize(
    ("end", "pack"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda content: pa.compress(content, codec="zstd", asbytes=True)),
    ],
)
class TestPacked:
    def test_a_packed_file_is_unpacked(self, tmp_path: Path, end: str, pack: Any) -> None:
        (tmp_path / f"a.csv{end}").write_bytes(pack(LINES))
        assert one_row(str(tmp_path / f"a.csv{end}")) == FACTS[0]

    def test_parts_that_were_packed_one_by_one_may_have_a_header_each(
        self, tmp_path: Path, end: str, pack: Any
    ) -> None:
        (tmp_path / f"a.csv{end}").write_bytes(pack(LINES) + pack(LINES.replace(b"anna", b"ben")))
        assert [(row["user"], row["line"]) for row in read(tmp_path / f"a.csv{end}", "csv")] == [
            ("anna", 2),
            ("ben", 4),
        ]

    def test_a_file_cut_short_keeps_its_whole_lines_and_says_so(self, tmp_path: Path, end: str, pack: Any) -> None:
        text = "".join(
            f'{{"reader": "{number * 7919 % 99991}", "book": "b", "stars": 5}}\n' for number in range(100_000)
        )
        packed = pack(text.encode())
        (tmp_path / f"a.jsonl{end}").write_bytes(packed[: len(packed) * 9 // 10])
        columns = Columns(user="reader", item="book", rating="stars")
        rows = read(tmp_path / f"a.jsonl{end}", columns=columns)
        assert len(rows) > 5_000
        assert {row["reason"] for row in rows[:-1]} == {None}
        assert rows[-1]["reason"] == records.DAMAGED

    def test_a_name_that_does_not_fit_the_content_is_one_sentence(self, tmp_path: Path, end: str, pack: Any) -> None:
        assert f"rename it without {end} or pack it again" in complaint(tmp_path, "{}\n", f"notes{end}")
        assert f"give it a name that ends in {end}" in complaint(tmp_path, pack(LINES), "packed.csv", format="csv")

    def test_an_empty_file_is_called_empty(self, tmp_path: Path, end: str, pack: Any) -> None:
        for content in (b"", pack(b"")):
            assert "holds no rows" in complaint(tmp_path, content, f"a.csv{end}", format="csv")


def test_failing_storage_is_no_damaged_file(tmp_path: Path) -> None:
    """Half of a file that could not be fetched must not pass as a file of half the rows."""

    class Failing:
        def read(self, size: int) -> bytes:
            raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        list(records.numbered_lines(Failing(), 100))


def test_empty_files_among_others_are_no_mistake(tmp_path: Path) -> None:
    for form, header in (("csv", b"reader,book,stars,note,when\n"), ("jsonl", b"")):
        content = LINES if header else json.dumps(dict(zip(GOOD, GOOD.values(), strict=True))).encode()
        for name, part in (("a", b""), ("b", header), ("c", content), ("d", b"")):
            (tmp_path / f"{name}.{form}").write_bytes(part)
        assert len(read(tmp_path / f"*.{form}", form)) == 1
    for name in ("a", "b"):
        (tmp_path / f"{name}.none").write_text("")
    assert "a.none and the other 1 files (data.interactions) holds no rows" in complaint(
        tmp_path, None, path=str(tmp_path / "*.none")
    )
    assert "is empty; write it again" in complaint(tmp_path, "", "a.parquet", format="parquet")


def test_members_of_an_archive_are_read_by_a_chained_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("inner/a.csv", LINES)
        archive.writestr("inner/b.csv.gz", gzip.compress(LINES.replace(b"anna", b"ben")))
    monkeypatch.chdir(tmp_path)
    assert one_row("zip://inner/a.csv::all.zip") == FACTS[0]
    assert one_row("simplecache::zip://inner/a.csv::all.zip") == FACTS[0]
    columns = OWN_COLUMNS
    source = Source(path="zip://inner/*::all.zip", format="csv", columns=columns)
    layout = inspect(source, "interactions", 3.0)
    assert [row["user"] for row in rows_of(layout)] == ["anna", "ben"]
    assert layout.files[0] == f"zip://inner/a.csv::{tmp_path}/all.zip", "also for a worker in another directory"
    assert layout.file_labels == ["zip://inner/a.csv::all.zip", "zip://inner/b.csv.gz::all.zip"]
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as packed:
        packed.add(tmp_path / "all.zip", "x.zip")
    assert "zip://*.csv::" in complaint(tmp_path, None, path=str(tmp_path / "all.zip"), format="csv")
    assert "tar://*.csv::" in complaint(tmp_path, None, path=str(tmp_path / "all.tar.gz"), format="csv")
    assert "cannot be opened" in complaint(tmp_path, None, path="zip://a.csv::none.zip", format="csv")
    assert "cannot be opened" in complaint(tmp_path, "no zip", "bad.zip", path=f"zip://a::{tmp_path}/bad.zip")
    assert "does not exist" in complaint(tmp_path, None, path="zip://c.csv::all.zip", format="csv")
    assert "cannot be opened (Protocol not known: nosuch)" in complaint(tmp_path, None, path="nosuch://a.csv")


def test_a_name_may_hold_the_characters_of_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "part[1].csv").write_bytes(LINES)
    assert one_row(str(tmp_path / "part[1].csv")) == FACTS[0]


def test_delimiter_encoding_and_decimal_are_settings_of_the_source(tmp_path: Path) -> None:
    text = 'reader;book;stars;note;when\nanna;b1;4,5;"für; ""alle""\nda";1000\n'
    (tmp_path / "a.csv").write_bytes(text.encode("cp1252"))
    european = {"delimiter": ";", "encoding": "cp1252", "decimal": ","}
    assert one_row(str(tmp_path / "a.csv"), **european) == ("anna", "b1", 4.5, 1000, 'für; "alle"\nda')
    (tmp_path / "b.csv").write_bytes(text.replace("4,5", "5").encode("cp1252"))
    assert one_row(str(tmp_path / "b.csv"), **european)[2] == 5.0
    (tmp_path / "c.txt").write_text("reader::book::stars::note::when\nanna::b1::5::so good::1000\n")
    assert one_row(str(tmp_path / "c.txt"), "tsv", delimiter="::") == FACTS[0]


def test_another_delimiter_encoding_or_decimal_is_told(tmp_path: Path) -> None:
    header = "reader;book;stars;note;when\n"
    assert "set data.interactions.delimiter to ';'" in complaint(
        tmp_path, f"{header}a;b;1;x;2\n", "a.csv", format="csv"
    )
    (tmp_path / "b.csv").write_bytes(f"{header}a;b;1,5;x;2\na;b;1;ü;2\n".encode("latin-1"))
    source = {"path": str(tmp_path / "b.csv"), "format": "csv", "columns": OWN_COLUMNS, "delimiter": ";"}
    comma, umlaut = rows_of(inspect(Source(**source), "interactions", 3.0))
    assert (comma["reason"], umlaut["reason"]) == (f"{values.BAD_RATING} (see decimal)", values.NOT_UTF8)
    _, umlaut = rows_of(inspect(Source(**source, encoding="ascii"), "interactions", 3.0))
    assert umlaut["reason"] == records.OTHER_ENCODING
    utf16 = f"{header}a;b;1;x;2\n".encode("utf-16")
    assert "is UTF-16; write it as UTF-8" in complaint(tmp_path, utf16, "c.csv", format="csv")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "jsonl", "delimiter": ";"}, "delimiter is for the formats csv and tsv"),
        ({"format": "csv", "delimiter": "::"}, "is not one ASCII character"),
        ({"format": "csv", "delimiter": '"'}, "is not one ASCII character"),
        ({"format": "csv", "encoding": "utf-16"}, "does not write ASCII as single bytes"),
        ({"format": "csv", "encoding": "klingon"}, "is not known"),
        ({"format": "csv", "encoding": "hex"}, "is not known"),
    ],
)
def test_settings_of_text_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    data = {"interactions": {"path": "a.csv", **settings}}
    with pytest.raises(ConfigError, match=said) as caught:
        parse_config({"output_dir": "out", "data": data})
    assert "data.interactions" in str(caught.value)
