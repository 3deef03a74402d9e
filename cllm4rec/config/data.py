"""The raw files, and which of their rows are kept."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cllm4rec.config.base import Fraction, Positive, Section

MAX_ID_CHARS = 1024
"""The longest id that any part takes: what prepare keeps, the endpoint must be able to ask for."""


class Columns(Section):
    """The names of the columns. A name that is given here also replaces that of a format that knows its columns."""

    user: str | None = Field(None, description="Column of the user id. null: the format's own, or no such column.")
    item: str | None = Field(None, description="Column of the item id. null: the format's own, or no such column.")
    rating: str | None = Field(None, description="Column of the rating. null: the format's own, or no ratings.")
    text: str | list[str] | None = Field(
        None,
        description="Column of the text, or several columns that are joined in order. null: the format's own, or no "
        "texts.",
    )
    timestamp: str | None = Field(
        None,
        description="Column of the time: a number or a date. null: the format's own, or no times.",
    )


Format = Literal[
    "amazon2014", "amazon2018", "amazon2023", "yelp", "movielens", "recbole", "jsonl", "csv", "tsv", "parquet", "delta"
]


class Source(Section):
    """Files of one kind."""

    path: str | list[str] = Field(
        description="A file, a glob, a Delta table, a folder of Parquet files, or a list of them; local paths or fsspec URIs. Files "
        "whose names end in .gz, .bz2, .xz or .zst are unpacked."
    )
    format: Format = Field(
        "jsonl",
        description="How the files are written. jsonl, csv, tsv, parquet and delta need `columns`; the others know "
        "theirs.",
    )
    columns: Columns = Columns()
    delimiter: str | None = Field(
        None, min_length=1, description="What separates the columns of csv and tsv. null: a comma, a tab."
    )
    encoding: str | None = Field(
        None,
        description="Encoding of text files, such as latin-1 or cp1252. null: UTF-8 (movielens: Latin-1 where a line is not "
        "UTF-8).",
    )
    decimal: Literal[".", ","] | None = Field(
        None, description="What stands before the fraction of a rating in text. null: a point."
    )
    time_unit: Literal["s", "ms", "us", "ns"] | None = Field(
        None,
        description="Unit of times that are numbers since 1970. null: the format's own (ms for amazon2023, else s).",
    )
    time_format: str | None = Field(
        None,
        description="How times are written, as a format of strptime such as %d/%m/%Y. null: numbers, ISO 8601 and other dates "
        "that can mean one day only.",
    )

    @model_validator(mode="after")
    def _text_can_be_read(self) -> Self:
        if self.delimiter is not None and self.format not in ("csv", "tsv"):
            raise ValueError(f"delimiter is for the formats csv and tsv; format {self.format} has its own")
        is_one = self.delimiter is None or (len(self.delimiter) == 1 and self.delimiter.isascii())
        if self.format == "csv" and (not is_one or self.delimiter in ('"', "\n", "\r")):
            raise ValueError(
                f"delimiter {self.delimiter!r} is not one ASCII character; use format tsv for files without quotes"
            )
        if self.encoding is not None and not _writes_ascii(self.encoding):
            raise ValueError(
                f"encoding {self.encoding!r} is not known, or does not write ASCII as single bytes; write the files as UTF-8"
            )
        return self


def _writes_ascii(encoding: str) -> bool:
    """Files are divided into lines and columns before they are decoded."""
    try:
        return '\n,;"'.encode(encoding) == b'\n,;"'
    except LookupError:
        return False


class Split(Section):
    """How each user's interactions are divided into train, validation and test."""

    kind: Literal["random", "temporal", "leave_one_out"] = Field(
        "random",
        description="Which items of a user are held out: random ones, the latest ones (temporal), or the last one for "
        "test and the one before it for validation (leave_one_out).",
    )
    validation: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.1,
        description="Share of each user's items for validation, at least one item; 0: none, and training runs all its epochs. "
        "Not used by leave_one_out.",
    )
    test: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.1,
        description="Share of each user's items for test, at least one item; 0: none, and evaluate is skipped. Not used by "
        "leave_one_out.",
    )
    seed: int = Field(0, description="Seed of the random split.")

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        if self.validation + self.test >= 1.0:
            raise ValueError(
                f"data.split.validation {self.validation} and data.split.test {self.test} leave nothing to train on; "
                "make them sum to less than 1"
            )
        return self

    @property
    def has_validation(self) -> bool:
        """Whether anything is held out to choose the best epoch by."""
        return self.kind == "leave_one_out" or self.validation > 0.0

    @property
    def has_test(self) -> bool:
        """Whether anything is held out to evaluate on. A production model may train on everything."""
        return self.kind == "leave_one_out" or self.test > 0.0


class ExpectedCounts(Section):
    """The counts of a published data set after prepare. Other counts mean another data set."""

    users: Positive = Field(description="Number of users.")
    items: Positive = Field(description="Number of items.")
    interactions: Positive = Field(description="Number of interactions.")


class DataConfig(Section):
    """The raw files, and which of their rows are kept."""

    interactions: Source = Field(
        description="Who interacted with which item, with ratings, reviews and times if known."
    )
    items: Source | None = Field(None, description="Texts about items. null: none.")
    users: Source | None = Field(None, description="Texts about users. null: none.")
    min_rating: float | None = Field(
        3.0, description="Ratings strictly above this are kept. null: every interaction is kept (implicit data)."
    )
    core: Positive = Field(
        5, description="Every user and item that is kept has at least this many interactions with the others (k-core)."
    )
    expected: ExpectedCounts | None = Field(
        None, description="Prepare fails if it keeps other counts than these. null: no check."
    )
    split: Split = Split()
    max_bad_fraction: Fraction = Field(
        0.01, description="Prepare stops if a larger share of a source's rows is unreadable."
    )
    max_line_bytes: Positive = Field(1_000_000, description="A line of more bytes is quarantined.")
    max_id_chars: Annotated[int, Field(ge=1, le=MAX_ID_CHARS)] = Field(
        256, description="A row whose user or item id has more characters is quarantined."
    )
    max_text_tokens: Positive = Field(
        128, description="Texts are cut to this many tokens. At most model.max_tokens - 16."
    )
