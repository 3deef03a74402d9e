"""The last two passes of prepare: selected texts → tokenized documents → one sorted and audited file per bucket.

Tokenizing turns each staging file of texts into a file of draft documents, sorted by bucket. The second pass gathers each
bucket from all drafts, adds the interaction documents, and writes the files that `cllm4rec.data.prepared` describes. A
bucket is sorted, so its bytes do not depend on which task finished first. A process holds a few buckets at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cllm4rec.arrays.histories import SPLITS
from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import Documents, Kind, Prompts
from cllm4rec.data.ingest import by_column
from cllm4rec.data.prepared import bucket_name, bucket_of
from cllm4rec.data.ray_data import Executor
from cllm4rec.data.tokenizer import Encoder
from cllm4rec.storage.files import filesystem, join, list_files, read_tables, write_table
from cllm4rec.typing import Array

LEAKS = ("pairs_in_two_splits", "held_out_texts", "held_out_items")
"""Counts of the audit that must all be 0."""
MAX_BUCKETS_PER_TASK = 16
ROW_GROUP_ROWS = 8192
_COUNTS = pa.schema([("name", pa.string()), ("count", pa.int64())])
SPELLED_ID = re.compile(r"\b(?:user|item)_\d+")
"""An ID token as text. Harmless here; the code of the paper's authors would read it as the ID."""


@dataclasses.dataclass(frozen=True)
class PrepareContext:
    """What the tasks of both passes share: folders, prompts, and the sizes of the data set."""

    staging: str
    text_files: list[str]
    """Names of the staging files that hold texts."""
    prepared: str
    tokenizer_digest: str
    prompts: Prompts
    token_space: TokenSpace
    num_buckets: int
    max_text_tokens: int

    @property
    def drafts(self) -> str:
        return join(self.staging, "documents")

    def path(self, table: str, bucket: int) -> str:
        return join(self.prepared, table, bucket_name(bucket))

    def first_user(self, bucket: int) -> int:
        """The first user of a bucket (see `prepared.bucket_of`)."""
        return -(-bucket * self.token_space.num_users // self.num_buckets)

    @property
    def encoder(self) -> Encoder:
        return _load_encoder(join(self.prepared, "tokenizer"), self.tokenizer_digest)


@functools.lru_cache(maxsize=1)
def _load_encoder(directory: str, digest: str) -> Encoder:
    """Loaded once per process. The digest distinguishes tokenizers that were in this folder at different times."""
    return Encoder.load(directory)


def read_texts(staging: str, text_files: list[str], selected: pa.Table) -> Iterator[tuple[pa.Table, list[str]]]:
    """The selected rows of each staging file with their texts, one file at a time.

    `selected` has the columns text_file (an index into `text_files`), text_row (a row of that file), user, item and kind.
    """
    for rows in by_column([selected], "text_file"):
        texts = read_tables([join(staging, text_files[rows["text_file"][0].as_py()])], ["text"])["text"]
        yield rows, texts.take(rows["text_row"]).to_pylist()


def tokenize(context: PrepareContext, selected: pa.Table, executor: Executor) -> int:
    """Write the selected texts as draft documents. Returns how many texts contain an ID token as text."""
    task = functools.partial(_tokenize_block, context=context)
    blocks = executor.map_tables(list(by_column([selected], "text_file")), task)
    return sum(int(block["spelled"].to_numpy().sum()) for block in blocks)


def _tokenize_block(selected: pa.Table, context: PrepareContext) -> Iterator[pa.Table]:
    """Task: the texts of one staging file as documents, sorted by bucket."""
    for rows, texts in read_texts(context.staging, context.text_files, selected):
        documents = text_documents(context, rows, context.encoder.encode(texts, context.max_text_tokens))
        bucket = _bucket_of_documents(documents, context)
        order = np.argsort(bucket, kind="stable")
        table = documents.take(order).to_arrow().append_column("bucket", pa.array(bucket[order], pa.int64()))
        name = context.text_files[rows["text_file"][0].as_py()]
        write_table(table, join(context.drafts, name), row_group_size=ROW_GROUP_ROWS)
        yield pa.table({"spelled": [sum(SPELLED_ID.search(text) is not None for text in texts)]})


def text_documents(context: PrepareContext, rows: pa.Table, words: Ragged) -> Documents:
    """One document for each row that has words; `rows` has the columns kind, user and item."""
    kind, user, item = (rows[name].to_numpy() for name in ("kind", "user", "item"))
    documents = []
    for text_kind in np.unique(kind):
        mine = np.flatnonzero((kind == text_kind) & (words.lengths > 0))
        documents.append(_of_kind(Kind(text_kind), context, user[mine], item[mine], words.take(mine)))
    return Documents.concat(documents)


def _of_kind(kind: Kind, context: PrepareContext, user: Array, item: Array, words: Ragged) -> Documents:
    if kind == Kind.REVIEW:
        return context.prompts.reviews(context.token_space, user, item, words)
    if kind == Kind.USER_TEXT:
        return context.prompts.user_texts(context.token_space, user, words)
    assert kind == Kind.ITEM_TEXT
    return context.prompts.item_texts(context.token_space, item, words)


def _bucket_of_documents(documents: Documents, context: PrepareContext) -> Array:
    """The bucket of the user; for item texts, which have no user, the bucket of the item."""
    of_user = bucket_of(documents.user, context.token_space.num_users, context.num_buckets)
    of_item = bucket_of(documents.item, context.token_space.num_items, context.num_buckets)
    return np.where(documents.user >= 0, of_user, of_item)


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Interactions of consecutive users, sorted by user, time and item. `split` indexes SPLITS, `time` is Unix seconds.

    For all users, `user` and `item` are int32, to save memory; `of_users` returns int64, the type of the files.
    """

    user: Array
    item: Array
    split: Array
    time: Array

    def of_users(self, first: int, last: int) -> Interactions:
        """The interactions of users first..last-1."""
        rows = slice(
            *np.searchsorted(self.user, np.array([first, last], self.user.dtype))
        )  # another type would copy the column
        return Interactions(
            self.user[rows].astype(np.int64), self.item[rows].astype(np.int64), self.split[rows], self.time[rows]
        )

    def items_in(self, split: int, users: Array) -> Ragged:
        """The items of each user in one split, oldest first; `users` are consecutive."""
        mine = self.split == split
        return Ragged.from_rows(self.item[mine], self.user[mine] - users[:1].sum(), len(users))

    def to_arrow(self) -> pa.Table:
        names = pa.array(SPLITS).take(pa.array(self.split.astype(np.int64)))
        return pa.table({"user": self.user, "item": self.item, "split": names, "time": self.time})


def write_buckets(
    context: PrepareContext, user_ids: Array, interactions: Interactions, executor: Executor
) -> Counter[str]:
    """Write `interactions`, `histories` and `documents`. Returns the counts of `audit_bucket`, summed over all buckets."""
    ranges = [
        _range_table(context, first, last, user_ids, interactions)
        for first, last in _bucket_ranges(context.num_buckets, executor.num_cpus)
    ]
    totals: Counter[str] = Counter()
    for block in executor.map_tables(ranges, functools.partial(_write_range, context=context)):
        for name, count in zip(block["name"].to_pylist(), block["count"].to_pylist(), strict=True):
            totals[name] += count
    return totals


def _bucket_ranges(num_buckets: int, num_cpus: int) -> list[tuple[int, int]]:
    """The buckets first..last-1 of each task: few enough to fit in memory, with at least one task per CPU."""
    num_tasks = min(num_buckets, max(num_cpus, -(-num_buckets // MAX_BUCKETS_PER_TASK)))
    bounds = np.linspace(0, num_buckets, num_tasks + 1).astype(int).tolist()
    return list(itertools.pairwise(bounds))


def _range_table(
    context: PrepareContext, first: int, last: int, user_ids: Array, interactions: Interactions
) -> pa.Table:
    """One row with everything about the users of buckets first..last-1."""
    low, high = context.first_user(first), context.first_user(last)
    part = interactions.of_users(low, high)
    columns = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    ids = pa.array([user_ids[low:high].tolist()], pa.large_list(pa.string()))
    return pa.table(
        {"first": [first], "last": [last], "user_ids": ids} | {name: [rows] for name, rows in columns.items()}
    )


def _write_range(table: pa.Table, context: PrepareContext) -> Iterator[pa.Table]:
    """Task: write and audit the buckets of each row of a range table."""
    totals: Counter[str] = Counter()
    for row in range(len(table)):
        first, last, user_ids = (table[name][row].as_py() for name in ("first", "last", "user_ids"))
        interactions = Interactions(
            *(np.asarray(table[field.name][row].values) for field in dataclasses.fields(Interactions))
        )
        drafts = _drafts(context, first, last)
        for bucket in range(first, last):
            low, high = context.first_user(bucket), context.first_user(bucket + 1)
            ids = user_ids[low - context.first_user(first) : high - context.first_user(first)]
            texts = [Documents.from_arrow(draft.filter(pc.equal(draft["bucket"], bucket))) for draft in drafts]
            _write_bucket(context, bucket, np.arange(low, high), ids, interactions.of_users(low, high), texts)
            totals += audit_bucket(context, bucket)
    yield pa.table([list(totals), list(totals.values())], schema=_COUNTS)


def _drafts(context: PrepareContext, first: int, last: int) -> list[pa.Table]:
    """The draft documents of buckets first..last-1. Row groups of other buckets are not read."""
    fs, folder = filesystem(context.drafts)
    within = [("bucket", ">=", first), ("bucket", "<", last)]
    files = list_files(context.drafts)
    return [pq.read_table(f"{folder}/{name}", filesystem=fs, filters=within) for name in files]


def _write_bucket(
    context: PrepareContext,
    bucket: int,
    users: Array,
    user_ids: list[str],
    interactions: Interactions,
    texts: list[Documents],
) -> None:
    histories = {name: interactions.items_in(split, users) for split, name in enumerate(SPLITS)}
    train = histories["train"]
    active = np.flatnonzero(train.lengths)
    sequences = context.prompts.interactions(context.token_space, users[active], train.take(active))
    rows = {"user": pa.array(users, pa.int64()), "user_id": pa.array(user_ids, pa.string())}
    rows |= {name: items.to_arrow() for name, items in histories.items()}
    write_table(interactions.to_arrow(), context.path("interactions", bucket))
    write_table(pa.table(rows), context.path("histories", bucket))
    write_table(Documents.concat([sequences, *texts]).in_order().to_arrow(), context.path("documents", bucket))


def audit_bucket(context: PrepareContext, bucket: int) -> Counter[str]:
    """Read the files of a bucket and count: documents and tokens by kind, and the leaks of LEAKS.

    Leaks are `pairs_in_two_splits`, `held_out_texts` (reviews of validation or test pairs among the documents) and
    `held_out_items` (validation or test items in interaction documents).
    """
    table = read_tables([context.path("interactions", bucket)])
    documents = Documents.from_arrow(read_tables([context.path("documents", bucket)]))
    token_space = context.token_space

    def pairs(user: Array, item: Array) -> Array:
        """User and item as one integer."""
        return user * token_space.num_items + item

    written = pairs(table["user"].to_numpy(), table["item"].to_numpy())
    held_out = written[pc.not_equal(table["split"], "train").to_numpy()]
    reviews = documents.of_kinds([Kind.REVIEW])
    sequences = documents.of_kinds([Kind.INTERACTIONS])
    read = pairs(sequences.user[sequences.main.rows], token_space.item_index(sequences.main.values))
    counts = Counter(
        pairs_in_two_splits=len(written) - len(np.unique(written)),
        held_out_texts=int(np.isin(pairs(reviews.user, reviews.item), held_out).sum()),
        held_out_items=int(np.isin(read, held_out).sum()),
    )
    for kind in np.unique(documents.kind):
        name = Kind(kind).name.lower()
        counts[f"documents.{name}"] = int((documents.kind == kind).sum())
        counts[f"tokens.{name}"] = int(documents.main.lengths[documents.kind == kind].sum())
    return counts
