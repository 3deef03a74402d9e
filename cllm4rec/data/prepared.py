"""What is in a `prepared/` directory and how to read it: the contract between `prepare` and every later stage.

    prepared/
      users.parquet, items.parquet         the Catalog: index, id, text (items also num_train, the training interactions)
      tokenizer/                           the backbone's tokenizer, as `save_pretrained` writes it
      prompts.json                         the prompts' words as token ids (Prompts), and num_words (N)
      interactions/bucket-00000.parquet    user, item, split (SPLITS), time; sorted by user, time, item
      histories/bucket-00000.parquet       the same facts, a row a user: user, user_id, train, validation, test (lists of
                                           item indices, oldest first): what streams through scoring
      documents/bucket-00000.parquet       kind, user, item, prompt, main (Documents), in order of kind, user, item
      quarantine/                          file, line, reason of every refused row; never its text
      audit.json                           the leakage audit
Buckets partition the users (and, for item texts, the items): a worker owns whole buckets, so a user's documents are all on one worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from cllm4rec.arrays.histories import SPLITS, Histories
from cllm4rec.arrays.ids import TokenSpace, read_sizes
from cllm4rec.data.documents import Documents, Prompts
from cllm4rec.storage.files import filesystem, join, read_json, read_tables, write_json
from cllm4rec.typing import Array, IntArray

USERS_PER_BUCKET = 4096
MIN_BUCKETS = 16


def num_buckets(num_users: int) -> int:
    """Enough buckets that one is small beside a worker's memory and that 16 workers can share the smallest data set."""
    return max(MIN_BUCKETS, -(-num_users // USERS_PER_BUCKET))


def bucket_of(index: Array, total: int, buckets: int) -> IntArray:
    """Bucket of each user (or item) index out of `total`: contiguous ranges of nearly equal size."""
    return np.asarray(index, np.int64) * buckets // max(total, 1)


def bucket_name(bucket: int) -> str:
    return f"bucket-{bucket:05d}.parquet"


def bucket_paths(prepared_dir: str, table: str, rank: int = 0, world_size: int = 1) -> list[str]:
    """Files of `interactions`, `histories` or `documents` that belong to worker `rank` of `world_size`, in order."""
    fs, path = filesystem(join(prepared_dir, table))
    names = sorted(str(name).rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))
    return [join(prepared_dir, table, name) for name in names if name.endswith(".parquet")][rank::world_size]


@dataclasses.dataclass(frozen=True)
class PromptTokens:
    """What the tokenizer fixed at prepare: the prompts' tokens and N."""

    prompts: Prompts
    num_words: int

    def save(self, directory: str) -> None:
        write_json(join(directory, "prompts.json"), {"num_words": self.num_words, **dataclasses.asdict(self.prompts)})

    @classmethod
    def load(cls, directory: str) -> PromptTokens:
        raw = read_json(join(directory, "prompts.json"))
        return cls(num_words=raw.pop("num_words"), prompts=Prompts(**raw))


def load_histories(prepared_dir: str) -> Histories:
    """Everybody's history, in order of user."""
    return Histories.from_arrow(read_tables(bucket_paths(prepared_dir, "histories"), ["user", *SPLITS]))


def load_documents(prepared_dir: str, rank: int = 0, world_size: int = 1) -> Documents:
    """One worker's documents, read without Ray; see `cllm4rec.training.ray_trainer` for the same through Ray Data."""
    return Documents.from_arrow(read_tables(bucket_paths(prepared_dir, "documents", rank, world_size))).in_order()


def documents_by_bucket(prepared_dir: str) -> Iterator[Documents]:
    """All documents, a bucket of users at a time: no more of them is in memory."""
    for path in bucket_paths(prepared_dir, "documents"):
        yield Documents.from_arrow(read_tables([path]))


def load_token_space(prepared_dir: str) -> tuple[PromptTokens, TokenSpace]:
    """What the tokenizer fixed and the sizes of the token ids; the catalog is not read."""
    prompt_tokens = PromptTokens.load(prepared_dir)
    return prompt_tokens, TokenSpace(prompt_tokens.num_words, *read_sizes(prepared_dir))
