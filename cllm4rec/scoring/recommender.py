"""Recommendations by user id: what the endpoint, notebooks and agents call. Needs neither Ray nor HTTP.

    rec = Recommender.from_pretrained("runs/demo")                 # the current model of an output_dir
    rec.recommend(user_id="A000000000", k=5)                       # [Recommendation(item_id, score, text), ...]
    rec.recommend(history=["B0000537", "B0000511"], exclude=["B0000555"])
    rec.recommend_many(frame, k=5)                                 # a pandas DataFrame or an Arrow table
    rec.answer([Query(user_id="A000000000"), Query(history=["B0000537"], k=5)])

All of them go through `Recommender.answer`, and that through the Scorer, so the same question has the same answer in a
notebook, from the endpoint and in the published table.

Shapes: B queries of one batch, K the largest k among them.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import RulesConfig, parse_section
from cllm4rec.errors import ConfigError
from cllm4rec.run import Run
from cllm4rec.scoring.rules import RuleBook, Rules
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.scoring.user_histories import UserHistories
from cllm4rec.storage.artifacts import MANIFEST, read_manifest
from cllm4rec.storage.files import exists, join
from cllm4rec.storage.registry import current_model
from cllm4rec.storage.tombstones import Tombstones, TombstoneWatcher
from cllm4rec.typing import Float32Array, IntArray

if TYPE_CHECKING:
    import pandas as pd

MAX_K = 1000

LISTS_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("texts", pa.list_(pa.string())),
    ]
)
"""Columns of the table that `recommend_many` returns."""

_QUERY_COLUMNS = ("user_id", "history", "exclude")
_BATCH_QUERIES = 1024
_BATCH_ITEMS = 65_536
"""A batch of `recommend_many` holds at most this many recommendations, so that its memory is bounded for every k."""

Users = TypeVar("Users", "pd.DataFrame", pa.Table)


@dataclasses.dataclass(frozen=True)
class Query:
    """One question: a known user, a history, or a known user and further items. Raises ConfigError if it is malformed.

    history: item ids, oldest first; added to the stored history of `user_id`. exclude: item ids that are not recommended.
    """

    user_id: str | None = None
    history: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    k: int = 10

    def __post_init__(self) -> None:
        if self.user_id is None and self.history is None:
            raise ConfigError("a query has neither user_id nor history; give one of them or both")
        if self.user_id is not None and not isinstance(self.user_id, str):
            raise ConfigError(f"user_id is of type {type(self.user_id).__name__}; ids are strings, pass str(user_id)")
        _check_item_ids("history", () if self.history is None else self.history)
        _check_item_ids("exclude", self.exclude)
        _check_k(self.k)


class Recommendation(NamedTuple):
    item_id: str
    score: float
    text: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """The items for one query, best first; fewer than k if fewer remain.

    cold_start: neither the user nor an item of the history is known; `items` are the popular ones, and a score is the
    item's share of the training interactions. Otherwise scores are logits.
    ignored_items: ids of `history` and `exclude` that the model does not know, each once.
    """

    items: list[Recommendation]
    cold_start: bool
    ignored_items: list[str]


@dataclasses.dataclass(frozen=True)
class EncodedQuery:
    """A query as indices of the model. `user` is -1 for an unknown user; `ignored` holds unknown item ids."""

    user: int
    history: list[int]
    exclude: list[int]
    ignored: list[str]

    @property
    def is_cold(self) -> bool:
        return self.user < 0 and not self.history


def utc_today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


class Recommender:
    """Answers queries with a Scorer and the stored histories of its users.

    `histories` holds all known items of every user: train, validation and test, because in production every observed
    interaction is history. `erased` returns the erased users. They are treated as unknown: neither their embedding nor
    their history is used. `today` is the day of the rules.
    """

    def __init__(
        self,
        scorer: Scorer,
        histories: UserHistories,
        rules: RuleBook | None = None,
        erased: Callable[[], Tombstones] = Tombstones,
        today: Callable[[], datetime.date] = utc_today,
    ) -> None:
        assert len(histories.items) == scorer.catalog.num_users + len(histories.new_users)
        self.scorer, self.histories, self.rules, self.erased, self.today = scorer, histories, rules, erased, today
        self._day, self._rules_of_day = datetime.date.min, Rules()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        prepared_dir: str | os.PathLike[str] | None = None,
        *,
        rules: RulesConfig | Mapping[str, Any] | None = None,
        device: str | None = None,
    ) -> Recommender:
        """Load a model and the histories of its users. Every file of the model is checked against its digest.

        directory: an output_dir, of which the current model and `prepared/` are loaded; or, together with `prepared_dir`,
        a model directory. The two may be of different age: users and items are matched by id. Paths or fsspec URIs.
        rules: what may be recommended; by default everything. The endpoint and the published table apply the run's
        `score.rules`: pass `rules=load_config(...).score.rules` for the same answers, or a dictionary in that form, such as
        {"deny": "deny.csv"}. Availability is that of today (UTC).
        device: by default the GPU if there is one.

        Erased users are unknown. They are read from the directory that contains the prepared directory (the output_dir of
        its run), and again whenever the list of them changes.

        Raises ConfigError for a wrong argument, such as a model directory without `prepared_dir`; ArtifactError if
        something is missing or damaged, or if model and histories have no user or no item in common; DataError if a rule
        file is wrong.
        """
        _check_paths(directory, prepared_dir)
        config = _rules_config(rules)
        _check_device(device)
        model_dir, histories_dir = _locate(os.fspath(directory), prepared_dir)
        scorer = Scorer.load(model_dir, device)
        read_manifest(histories_dir, "prepared")
        watcher = TombstoneWatcher(histories_dir.rstrip("/").rpartition("/")[0] or ".")
        book = RuleBook.read(config, scorer.catalog)
        return cls(scorer, UserHistories.load(histories_dir, scorer.catalog), book, watcher.current)

    @property
    def model_version(self) -> str:
        return self.scorer.model_version

    def recommend(
        self,
        user_id: str | None = None,
        *,
        history: Sequence[str] | pd.Series | None = None,
        exclude: Sequence[str] | pd.Series = (),
        k: int = 10,
    ) -> list[Recommendation]:
        """The k best items for a user, a history or both, best first. Arguments are those of `Query`, or pandas Series of ids.

        Items that the user already has are left out. Raises ConfigError for malformed arguments.
        """
        return self.answer([Query(user_id, _listed(history), _listed(exclude), k)])[0].items

    def recommend_many(self, users: Users, k: int = 10) -> Users:
        """The k best items for every row of a table, in the order of its rows.

        users: a pandas DataFrame or an Arrow table with `user_id`, `history` or both, and optionally `exclude`. The last two
        are columns of lists of item ids. A missing value is the same as an argument that is not given.
        Returns a table of the same kind with the columns of LISTS_SCHEMA; a DataFrame keeps its index. `user_id` is missing
        where none was given. Rows are answered in batches of bounded size. Raises ConfigError for a wrong column or value.
        """
        _check_k(k)
        table = _query_table(users)
        size = min(_BATCH_QUERIES, _BATCH_ITEMS // k)
        batches = [self._answer_table(table.slice(begin, size), begin, k) for begin in range(0, len(table), size)]
        lists = pa.Table.from_batches(batches, LISTS_SCHEMA)
        answered: Users = lists if isinstance(users, pa.Table) else lists.to_pandas().set_axis(users.index)
        return answered

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """One answer per query, from one forward pass. Each is bit for bit the answer that its query would get alone.

        Queries with different k share the pass: it ranks for the largest k, and the other lists are cut.
        """
        if not queries:
            return []
        erased = self.erased()
        encoded = [self._encode(query, erased) for query in queries]
        item_BK, score_BK = self.scorer.top_k(
            np.array([query.user for query in encoded], np.int64),
            Ragged.from_lists(query.history for query in encoded),
            max(query.k for query in queries),
            self._todays_rules(),
            exclude=Ragged.from_lists(query.exclude for query in encoded),
        )
        return [
            Answer(self._recommendations(items[: query.k], scores[: query.k]), one.is_cold, one.ignored)
            for query, one, items, scores in zip(queries, encoded, item_BK, score_BK, strict=True)
        ]

    def similar(self, item_id: str, k: int = 10) -> list[Recommendation]:
        """The k items most similar to an item, best first: those that the same users like. A score is the cosine of the
        collaborative embeddings, from -1 to 1. Rules that block items apply. Raises ConfigError for an unknown item."""
        _check_k(k)
        (similar,) = self.similar_many([item_id], k)
        if similar is None:
            raise ConfigError("the model knows no item with this id; give the id of an item of the training data")
        return similar

    def similar_many(self, item_ids: Sequence[str], k: int) -> list[list[Recommendation] | None]:
        """`similar` for several items in one product; None for an unknown one."""
        index = np.array([self.scorer.catalog.item_index(item_id) for item_id in item_ids], np.int64)
        known = np.flatnonzero(index >= 0)
        items, scores = self.scorer.similar(index[known], k, self._todays_rules())
        found = {row: self._recommendations(items[at], scores[at]) for at, row in enumerate(known.tolist())}
        return [found.get(row) for row in range(len(index))]

    def _todays_rules(self) -> Rules:
        """An endpoint runs for many days, and availability changes from day to day."""
        today = self.today()
        if self.rules is not None and today != self._day:
            self._day, self._rules_of_day = today, self.rules.on(today)
        return self._rules_of_day

    def _encode(self, query: Query, erased: Tombstones) -> EncodedQuery:
        user, row = self._rows(query.user_id, erased)
        stored = self.histories.items[row].tolist() if row >= 0 else []
        given, unknown = self._indices(() if query.history is None else query.history)
        exclude, unknown_exclude = self._indices(query.exclude)
        # An item is in a history once, at its first occurrence, as in the histories that the model was trained on.
        history = list(dict.fromkeys(stored + given))
        return EncodedQuery(user, history, exclude, list(dict.fromkeys(unknown + unknown_exclude)))

    def _rows(self, user_id: str | None, erased: Tombstones) -> tuple[int, int]:
        """A user's row of the user tables and of `histories`, each -1 if there is none."""
        if user_id is None or erased.contains([user_id])[0]:
            return -1, -1
        user = self.scorer.catalog.user_index(user_id)
        return user, self.histories.new_users.get(user_id, -1) if user < 0 else user

    def _indices(self, item_ids: Sequence[str]) -> tuple[list[int], list[str]]:
        """Indices of the known items and ids of the unknown ones, both in the given order."""
        index_of = self.scorer.catalog.item_index
        indices = [index_of(item_id) for item_id in item_ids]
        known = [index for index in indices if index >= 0]
        return known, [item_id for item_id, index in zip(item_ids, indices, strict=True) if index < 0]

    def _recommendations(self, items: IntArray, scores: Float32Array) -> list[Recommendation]:
        found, catalog = items >= 0, self.scorer.catalog
        return [
            Recommendation(catalog.item_ids[item], score, catalog.item_texts[item])
            for item, score in zip(items[found].tolist(), scores[found].tolist(), strict=True)
        ]

    def _answer_table(self, table: pa.Table, first_row: int, k: int) -> pa.RecordBatch:
        queries = list(_queries(table, first_row, k))
        lists = [answer.items for answer in self.answer(queries)]
        columns = [
            [query.user_id for query in queries],
            *([[getattr(item, field) for item in items] for items in lists] for field in Recommendation._fields),
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, LISTS_SCHEMA, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=LISTS_SCHEMA)


def _locate(directory: str, prepared_dir: str | os.PathLike[str] | None) -> tuple[str, str]:
    """Model directory and prepared directory."""
    if prepared_dir is not None:
        return directory, os.fspath(prepared_dir)
    if exists(join(directory, MANIFEST)):
        raise ConfigError(
            f"{directory} is one directory of a run; give the output_dir that contains it, or a model directory together "
            "with its prepared_dir"
        )
    return current_model(directory), Run(directory).prepared


def _check_paths(*directories: Any) -> None:
    for directory, name in zip(directories, ("the directory", "prepared_dir"), strict=True):
        is_absent = directory is None and name == "prepared_dir"
        if not is_absent and not isinstance(directory, str | os.PathLike):
            raise ConfigError(
                f"{name} is of type {type(directory).__name__}; give the output_dir of a run, such as 'runs/demo'"
            )


def _rules_config(rules: Any) -> RulesConfig:
    if rules is None or isinstance(rules, RulesConfig):
        return rules or RulesConfig()
    if not isinstance(rules, Mapping):
        raise ConfigError(f"rules is of type {type(rules).__name__}; give load_config(...).score.rules or a dictionary")
    return parse_section(RulesConfig, "score.rules", rules)


def _check_device(device: Any) -> None:
    if device is None:
        return
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; give 'cpu' or 'cuda', or leave it out")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, and torch finds no GPU; give 'cpu', or leave it out")


def _check_item_ids(name: str, item_ids: Any) -> None:
    if isinstance(item_ids, str) or not isinstance(item_ids, Sequence | np.ndarray):
        raise ConfigError(f"{name} is of type {type(item_ids).__name__}; give a list of item ids")
    for item_id in item_ids:
        if not isinstance(item_id, str):
            raise ConfigError(f"{name} holds a value of type {type(item_id).__name__}; item ids are strings")


def _listed(item_ids: Any) -> Any:
    """A pandas Series or Index as a list, because indexing it would mean its labels; anything else unchanged."""
    return item_ids.tolist() if hasattr(item_ids, "to_numpy") else item_ids


def _check_k(k: Any) -> None:
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or not 1 <= k <= MAX_K:
        raise ConfigError(f"k is {k!r}; give a whole number from 1 to {MAX_K}")


def _query_table(users: Any) -> pa.Table:
    """The table of queries in Arrow, after its columns are checked; values are checked by `Query`."""
    columns = getattr(users, "column_names" if isinstance(users, pa.Table) else "columns", None)
    if columns is None:
        raise ConfigError(f"recommend_many takes a pandas DataFrame or an Arrow table, not {type(users).__name__}")
    names = [str(name) for name in columns]
    unknown = [name for name in names if name not in _QUERY_COLUMNS]
    if unknown or len(set(names)) < len(names):
        wrong = f"the column {unknown[0]}" if unknown else "a column twice"
        raise ConfigError(f"recommend_many got {wrong}; select the columns user_id, history and exclude")
    if not {"user_id", "history"} & set(names):
        raise ConfigError("recommend_many got neither the column user_id nor the column history; give one or both")
    if isinstance(users, pa.Table):
        return users
    try:
        return pa.Table.from_pandas(users, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        raise ConfigError(
            "a column holds values of different types; user_id must hold strings, history and exclude lists of strings"
        ) from None


def _queries(table: pa.Table, first_row: int, k: int) -> Iterator[Query]:
    columns = {name: table[name].to_pylist() for name in table.column_names}
    for row in range(len(table)):
        values = {name: column[row] for name, column in columns.items() if column[row] is not None}
        try:
            yield Query(**values, k=k)
        except ConfigError as error:
            raise ConfigError(f"row {first_row + row} of the table: {error}") from None
