"""The last two passes of prepare: chosen texts → tokenized documents → one sorted file a bucket, audited.

Tokenizing writes one file a staging file, sorted by bucket. A second pass gathers each bucket from all of them, adds
the interaction documents and writes what `cllm4rec.data.prepared` describes. Sorted, a bucket's bytes do not depend on
which task was done first. Both passes hold a few buckets in one process at a time, never the data set.
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
import ray
import ray.data

from cllm4rec.arrays.histories import SPLITS
from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import Documents, Kind, Prompts
from cllm4rec.data.ingest import by_column, run_dataset
from cllm4rec.data.prepared import bucket_name, bucket_of
from cllm4rec.data.tokenizer import Encoder
from cllm4rec.storage.files import filesystem, join, list_files, read_tables, write_table
from cllm4rec.typing import Array

LEAKS = ("pairs_in_two_splits", "held_out_texts", "held_out_items")
"""Counts of the audit that must be 0."""
MAX_BUCKETS_PER_TASK = 16
ROW_GROUP_ROWS = 8192
_COUNTS = pa.schema([("name", pa.string()), ("count", pa.int64())])
SPELLED_ID = re.compile(r"\b(?:user|item)_\d+")
"""What an ID token would look like, were it spelled: harmless here, the authors' code takes it for the ID."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What the tasks of both passes need to know: where things lie, and the sizes of all that is numbered."""

    staging: str
    fragments: list[str]
    prepared: str
    tokenizer_digest: str
    prompts: Prompts
    space: TokenSpace
    buckets: int
    max_text_tokens: int

    @property
    def drafts(self) -> str:
        return join(self.staging, "documents")

    def path(self, table: str, bucket: int) -> str:
        return join(self.prepared, table, bucket_name(bucket))

    def first_user(self, bucket: int) -> int:
        """The inverse of `bucket_of`."""
        return -(-bucket * self.space.num_users // self.buckets)

    @property
    def encoder(self) -> Encoder:
        return _load_encoder(join(self.prepared, "tokenizer"), self.tokenizer_digest)


@functools.lru_cache(maxsize=1)
def _load_encoder(directory: str, digest: str) -> Encoder:
    """Loaded once a process; the digest tells apart what lay in the same place at different times."""
    return Encoder.load(directory)


def chosen_texts(staging: str, fragments: list[str], chosen: pa.Table) -> Iterator[tuple[pa.Table, list[str]]]:
    """The texts of chosen rows, one staging file at a time.

    `chosen` has columns fragment (a number into `fragments`), place (a row of that file), user, item and kind.
    """
    for rows in by_column([chosen], "fragment"):
        texts = read_tables([join(staging, fragments[rows["fragment"][0].as_py()])], ["text"])["text"]
        yield rows, texts.take(rows["place"]).to_pylist()


def tokenize(corpus: Corpus, chosen: pa.Table) -> int:
    """Tokenize the chosen texts in parallel and leave them as draft documents. Returns how many texts spell an ID."""
    blocks = list(by_column([chosen], "fragment"))
    if not blocks:
        return 0
    dataset = ray.data.from_arrow(blocks).map_batches(
        functools.partial(_tokenize_block, corpus=corpus), batch_size=None, batch_format="pyarrow"
    )
    return sum(int(block["spelled"].to_numpy().sum()) for block in run_dataset(dataset))


def _tokenize_block(chosen: pa.Table, corpus: Corpus) -> Iterator[pa.Table]:
    """Ray Data task: the texts of one staging file as documents, sorted by bucket."""
    for rows, texts in chosen_texts(corpus.staging, corpus.fragments, chosen):
        documents = text_documents(corpus, rows, corpus.encoder.encode(texts, corpus.max_text_tokens))
        bucket = _bucket_of_documents(documents, corpus)
        order = np.argsort(bucket, kind="stable")
        table = documents.take(order).to_arrow().append_column("bucket", pa.array(bucket[order], pa.int64()))
        name = corpus.fragments[rows["fragment"][0].as_py()]
        write_table(table, join(corpus.drafts, name), row_group_size=ROW_GROUP_ROWS)
        yield pa.table({"spelled": [sum(SPELLED_ID.search(text) is not None for text in texts)]})


def text_documents(corpus: Corpus, rows: pa.Table, words: Ragged) -> Documents:
    """One document for every row that has words; `rows` has columns kind, user, item."""
    kind, user, item = (rows[name].to_numpy() for name in ("kind", "user", "item"))
    parts = []
    for text_kind in np.unique(kind):
        mine = np.flatnonzero((kind == text_kind) & (words.lengths > 0))
        parts.append(_of_kind(Kind(text_kind), corpus, user[mine], item[mine], words.take(mine)))
    return Documents.concat(parts)


def _of_kind(kind: Kind, corpus: Corpus, user: Array, item: Array, words: Ragged) -> Documents:
    if kind == Kind.REVIEW:
        return corpus.prompts.reviews(corpus.space, user, item, words)
    if kind == Kind.USER_TEXT:
        return corpus.prompts.user_texts(corpus.space, user, words)
    assert kind == Kind.ITEM_TEXT
    return corpus.prompts.item_texts(corpus.space, item, words)


def _bucket_of_documents(documents: Documents, corpus: Corpus) -> Array:
    """The user's bucket; for item texts, which have no user, the item's."""
    of_user = bucket_of(documents.user, corpus.space.num_users, corpus.buckets)
    of_item = bucket_of(documents.item, corpus.space.num_items, corpus.buckets)
    return np.where(documents.user >= 0, of_user, of_item)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Interactions of consecutive users, sorted by user, time, item. `split` indexes SPLITS, `time` is unix seconds.

    Of all users, in one process, users and items are int32; of a few, as they are written, int64.
    """

    user: Array
    item: Array
    split: Array
    time: Array

    def of_users(self, first: int, last: int) -> Facts:
        """Those of users first..last-1."""
        rows = slice(*np.searchsorted(self.user, np.array([first, last], self.user.dtype)))  # another type would copy
        return Facts(
            self.user[rows].astype(np.int64), self.item[rows].astype(np.int64), self.split[rows], self.time[rows]
        )

    def items_in(self, split: int, users: Array) -> Ragged:
        """Each user's items of one split, oldest first."""
        mine = self.split == split
        return Ragged.from_rows(self.item[mine], self.user[mine] - users[:1].sum(), len(users))

    def to_arrow(self) -> pa.Table:
        names = pa.array(SPLITS).take(pa.array(self.split.astype(np.int64)))
        return pa.table({"user": self.user, "item": self.item, "split": names, "time": self.time})


def write_buckets(corpus: Corpus, user_ids: Array, facts: Facts) -> Counter[str]:
    """Write `interactions`, `histories` and `documents`. Returns the counts of `audit_bucket`, summed over buckets."""
    ranges = [_range_table(corpus, first, last, user_ids, facts) for first, last in _bucket_ranges(corpus.buckets)]
    dataset = ray.data.from_arrow(ranges).map_batches(
        functools.partial(_write_range, corpus=corpus), batch_size=None, batch_format="pyarrow"
    )
    totals: Counter[str] = Counter()
    for block in run_dataset(dataset):
        for name, count in zip(block["name"].to_pylist(), block["count"].to_pylist(), strict=True):
            totals[name] += count
    return totals


def _bucket_ranges(buckets: int) -> list[tuple[int, int]]:
    """First and last + 1 of the buckets that one task writes: few enough to fit, enough tasks for every core."""
    cores = int(ray.cluster_resources().get("CPU", 1))
    tasks = min(buckets, max(cores, -(-buckets // MAX_BUCKETS_PER_TASK)))
    bounds = np.linspace(0, buckets, tasks + 1).astype(int).tolist()
    return list(itertools.pairwise(bounds))


def _range_table(corpus: Corpus, first: int, last: int, user_ids: Array, facts: Facts) -> pa.Table:
    """One row that holds everything about the users of buckets first..last-1."""
    low, high = corpus.first_user(first), corpus.first_user(last)
    part = facts.of_users(low, high)
    columns = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    ids = pa.array([user_ids[low:high].tolist()], pa.large_list(pa.string()))
    return pa.table(
        {"first": [first], "last": [last], "user_ids": ids} | {name: [rows] for name, rows in columns.items()}
    )


def _write_range(table: pa.Table, corpus: Corpus) -> Iterator[pa.Table]:
    """Ray Data task: write and audit some buckets."""
    totals: Counter[str] = Counter()
    for row in range(len(table)):
        first, last, user_ids = (table[name][row].as_py() for name in ("first", "last", "user_ids"))
        facts = Facts(*(np.asarray(table[field.name][row].values) for field in dataclasses.fields(Facts)))
        drafts = _drafts(corpus, first, last)
        for bucket in range(first, last):
            low, high = corpus.first_user(bucket), corpus.first_user(bucket + 1)
            ids = user_ids[low - corpus.first_user(first) : high - corpus.first_user(first)]
            texts = [Documents.from_arrow(draft.filter(pc.equal(draft["bucket"], bucket))) for draft in drafts]
            _write_bucket(corpus, bucket, np.arange(low, high), ids, facts.of_users(low, high), texts)
            totals += audit_bucket(corpus, bucket)
    yield pa.table([list(totals), list(totals.values())], schema=_COUNTS)


def _drafts(corpus: Corpus, first: int, last: int) -> list[pa.Table]:
    """The draft documents of buckets first..last-1; row groups of other buckets are not read."""
    fs, folder = filesystem(corpus.drafts)
    within = [("bucket", ">=", first), ("bucket", "<", last)]
    files = list_files(corpus.drafts)
    return [pq.read_table(f"{folder}/{name}", filesystem=fs, filters=within) for name in files]


def _write_bucket(
    corpus: Corpus, bucket: int, users: Array, user_ids: list[str], facts: Facts, texts: list[Documents]
) -> None:
    histories = {name: facts.items_in(split, users) for split, name in enumerate(SPLITS)}
    train = histories["train"]
    active = np.flatnonzero(train.lengths)
    sequences = corpus.prompts.interactions(corpus.space, users[active], train.take(active))
    rows = {"user": pa.array(users, pa.int64()), "user_id": pa.array(user_ids, pa.string())}
    rows |= {name: items.to_arrow() for name, items in histories.items()}
    write_table(facts.to_arrow(), corpus.path("interactions", bucket))
    write_table(pa.table(rows), corpus.path("histories", bucket))
    write_table(Documents.concat([sequences, *texts]).in_order().to_arrow(), corpus.path("documents", bucket))


def audit_bucket(corpus: Corpus, bucket: int) -> Counter[str]:
    """Counts from the bucket's files as they lie there: documents and tokens by kind, and what must always be 0.

    That is `pairs_in_two_splits`, `held_out_texts` (reviews of validation or test pairs among the documents) and
    `held_out_items` (validation or test items in interaction documents).
    """
    facts = read_tables([corpus.path("interactions", bucket)])
    documents = Documents.from_arrow(read_tables([corpus.path("documents", bucket)]))
    pair = facts["user"].to_numpy() * corpus.space.num_items + facts["item"].to_numpy()
    held_out = pair[pc.not_equal(facts["split"], "train").to_numpy()]
    reviews = documents.of_kinds([Kind.REVIEW])
    sequences = documents.of_kinds([Kind.INTERACTIONS])
    read = sequences.user[sequences.main.rows] * corpus.space.num_items + corpus.space.item_index(sequences.main.values)
    counts = Counter(
        pairs_in_two_splits=len(pair) - len(np.unique(pair)),
        held_out_texts=int(np.isin(reviews.user * corpus.space.num_items + reviews.item, held_out).sum()),
        held_out_items=int(np.isin(read, held_out).sum()),
    )
    for kind in np.unique(documents.kind):
        name = Kind(kind).name.lower()
        counts[f"documents.{name}"] = int((documents.kind == kind).sum())
        counts[f"tokens.{name}"] = int(documents.main.lengths[documents.kind == kind].sum())
    return counts
