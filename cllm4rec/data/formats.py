"""The supported formats: how records are written and what each column means. This module opens no file."""

from __future__ import annotations

import dataclasses
import posixpath
from typing import Literal

from cllm4rec.config import Columns
from cllm4rec.data.times import IN_SECONDS, Clock, TimeUnit

Role = Literal["interactions", "items", "users"]
ROLES: tuple[Role, ...] = ("interactions", "items", "users")

_NONE = Columns()


@dataclasses.dataclass(frozen=True)
class Format:
    """How the records of a format are written, and its own column names for each role."""

    shape: Literal["json", "csv", "plain", "parquet"]
    interactions: Columns = _NONE
    items: Columns = _NONE
    users: Columns = _NONE
    delimiter: str = ""
    time_unit: TimeUnit = "s"


_AMAZON_REVIEWS = Columns(
    user="reviewerID", item="asin", rating="overall", text="reviewText", timestamp="unixReviewTime"
)
FORMATS: dict[str, Format] = {
    # `biography` exists only in the sample world: Amazon published no texts about users.
    "amazon2014": Format(
        "json",
        _AMAZON_REVIEWS,
        Columns(item="asin", text=["title", "description"]),
        Columns(user="reviewerID", text="biography"),
    ),
    "amazon2018": Format("json", _AMAZON_REVIEWS, Columns(item="asin", text=["title", "description"])),
    "amazon2023": Format(
        "json",
        Columns(user="user_id", item="parent_asin", rating="rating", text="text", timestamp="timestamp"),
        Columns(item="parent_asin", text=["title", "features", "description"]),
        time_unit="ms",
    ),
    "yelp": Format(
        "json",
        Columns(user="user_id", item="business_id", rating="stars", text="text", timestamp="date"),
        Columns(item="business_id", text=["name", "categories"]),
    ),
    "movielens": Format(
        "plain",
        Columns(user="user", item="item", rating="rating", timestamp="timestamp"),
        Columns(item="item", text=["title", "genres"]),
        Columns(user="user", text=["age", "gender", "occupation"]),
    ),
    "recbole": Format(
        "plain",
        Columns(user="user_id", item="item_id", rating="rating", timestamp="timestamp"),
        Columns(item="item_id"),
        Columns(user="user_id"),
        delimiter="\t",
    ),
    "jsonl": Format("json"),
    "csv": Format("csv", delimiter=","),
    "tsv": Format("plain", delimiter="\t"),
    "parquet": Format("parquet"),
    "delta": Format("parquet"),
}
MOVIELENS_NAMES: dict[tuple[str, str], tuple[str, ...]] = {
    ("interactions", "\t"): ("user", "item", "rating", "timestamp"),
    ("interactions", "::"): ("user", "item", "rating", "timestamp"),
    ("items", "::"): ("item", "title", "genres"),
    ("items", "|"): ("item", "title", "released", "video", "url", *(f"genre{number}" for number in range(19))),
    ("users", "::"): ("user", "gender", "age", "occupation", "zip"),
    ("users", "|"): ("user", "age", "gender", "occupation", "zip"),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One source after inspection: its files, how their records are written, and the columns that are read."""

    role: Role
    files: tuple[str, ...]
    format: str
    columns: Columns
    delimiter: str = ""
    names: tuple[str, ...] = ()
    """The names of all columns in file order, for formats whose records do not contain them."""
    clock: Clock = IN_SECONDS
    """How times are written."""
    encoding: str | None = None
    """Of text; None: UTF-8, and for MovieLens Latin-1 where a line is not UTF-8."""
    decimal: str = "."

    @property
    def shape(self) -> str:
        return FORMATS[self.format].shape

    @property
    def has_header(self) -> bool:
        return self.shape in ("csv", "plain") and self.format != "movielens"

    @property
    def text_columns(self) -> list[str]:
        text = self.columns.text
        return [] if text is None else [text] if isinstance(text, str) else text

    @property
    def file_labels(self) -> list[str]:
        """The names of the files without their common folder, for quarantine and messages."""
        if any("::" in file for file in self.files):
            return [short_name(file) for file in self.files]
        folder = posixpath.dirname(posixpath.commonprefix([f"{posixpath.dirname(file)}/" for file in self.files]))
        return [file[len(folder) :].lstrip("/") for file in self.files]


def short_name(file: str) -> str:
    """The name of a file for messages: ratings.csv, or zip://ratings.csv::all.zip of a chained URI."""
    *outer, last = file.split("::")
    return "::".join([*outer, posixpath.basename(last)])


def named_columns(columns: Columns) -> list[str]:
    """The names of all columns that are read, without repeats."""
    text = columns.text if isinstance(columns.text, list) else [columns.text]
    names = [columns.user, columns.item, columns.rating, *text, columns.timestamp]
    return list(dict.fromkeys(name for name in names if name is not None))
