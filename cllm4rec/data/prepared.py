"""The files of a `prepared/` directory and how to read them: the contract between `prepare` and all later stages.

    prepared/
      users.parquet, items.parquet         the Catalog: index, id, text (items also num_train, the training interactions)
      tokenizer/                           the backbone's tokenizer, as `save_pretrained` writes it
      prompts.json                         the words of the prompts as token ids (Prompts), and num_words (N)
      interactions/bucket-00000.parquet    user, item, split (SPLITS), time; sorted by user, time, item
      histories/bucket-00000.parquet       the same with one row per user: user, user_id, train, validation, test (lists
                                           of item indices, oldest first); read by scoring
      documents/bucket-00000.parquet       kind, user, item, prompt, main (Documents); sorted by kind, user, item
      quarantine/                          file, line and reason of each refused row; never its text
      audit.json                           the leakage audit

Buckets partition the users (and, for item texts, the items). A worker reads whole buckets, so all documents of a user are on
one worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from cllm4rec.arrays.histories import SPLITS, Histories
from cllm4rec.arrays.ids import TokenSpace, read_sizes
from cllm4rec.data.documents import Documents, Prompts
from cllm4rec.storage.artifacts import read_manifest, verify_files
from cllm4rec.storage.files import filesystem, join, read_json, read_tables, write_json
from cllm4rec.typing import Array, IntArray

USERS_PER_BUCKET = 4096
MIN_BUCKETS = 16


def num_buckets(num_users: int) -> int:
    """So many buckets that each fits easily in memory, and that 16 workers can share even the smallest data set."""
    return max(MIN_BUCKETS, -(-num_users // USERS_PER_BUCKET))


def bucket_of(index: Array, total: int, buckets: int) -> IntArray:
    """The bucket of each user (or item) index out of `total`. Buckets are contiguous ranges of nearly equal size."""
    return np.asarray(index, np.int64) * buckets // max(total, 1)


def bucket_name(bucket: int) -> str:
    return f"bucket-{bucket:05d}.parquet"


def bucket_paths(prepared_dir: str, table: str, rank: int = 0, world_size: int = 1) -> list[str]:
    """The files of `interactions`, `histories` or `documents` that worker `rank` of `world_size` reads, in order."""
    fs, path = filesystem(join(prepared_dir, table))
    names = sorted(str(name).rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))
    return [join(prepared_dir, table, name) for name in names if name.endswith(".parquet")][rank::world_size]


@dataclasses.dataclass(frozen=True)
class PromptTokens:
    """The tokens of the prompts and the number of words N, as `prepare` wrote them."""

    prompts: Prompts
    num_words: int

    def save(self, directory: str) -> None:
        write_json(join(directory, "prompts.json"), {"num_words": self.num_words, **dataclasses.asdict(self.prompts)})

    @classmethod
    def load(cls, directory: str) -> PromptTokens:
        raw = read_json(join(directory, "prompts.json"))
        return cls(num_words=raw.pop("num_words"), prompts=Prompts(**raw))


def load_histories(prepared_dir: str) -> Histories:
    """The histories of all users, in order of user index."""
    return Histories.from_arrow(read_tables(bucket_paths(prepared_dir, "histories"), ["user", *SPLITS]))


def load_documents(prepared_dir: str, rank: int = 0, world_size: int = 1) -> Documents:
    """The documents of one worker, read without Ray. `cllm4rec.training.ray_trainer` reads them with Ray Data."""
    return Documents.from_arrow(read_tables(bucket_paths(prepared_dir, "documents", rank, world_size))).in_order()


def documents_by_bucket(prepared_dir: str) -> Iterator[Documents]:
    """All documents, one bucket at a time, so that only one bucket is in memory."""
    for path in bucket_paths(prepared_dir, "documents"):
        yield Documents.from_arrow(read_tables([path]))


def verify_buckets(prepared_dir: str, rank: int = 0, world_size: int = 1) -> None:
    """Compare the documents and histories that a worker reads with their sha256, which `prepare` wrote.

    Raises ArtifactError that names a damaged file. A damaged Parquet file may also be read without an error.
    """
    manifest = read_manifest(prepared_dir, "prepared")
    for table in ("documents", "histories"):
        paths = bucket_paths(prepared_dir, table, rank, world_size)
        verify_files(prepared_dir, manifest, [f"{table}/{path.rsplit('/', 1)[-1]}" for path in paths])


def load_token_space(prepared_dir: str) -> tuple[PromptTokens, TokenSpace]:
    """The prompts and the token space, without reading the catalog."""
    prompt_tokens = PromptTokens.load(prepared_dir)
    return prompt_tokens, TokenSpace(prompt_tokens.num_words, *read_sizes(prepared_dir))
