"""The data of a benchmark: real data sets if they are available, else the sample world.

Speed depends only on lengths and indices, so random tokens replace the words if no tokenizer is available.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import Documents, Prompts
from cllm4rec.data.world import sample_world

NUM_WORDS = 50_257
"""GPT-2's vocabulary."""
MAX_TEXT_TOKENS = 128
_BEAUTY = "data/amazon_beauty/interactions.jsonl.gz"
_INSTRUMENTS = "data/amazon_musical_instruments/reviews_Musical_Instruments_5.json.gz"
_TOKENIZER = "weights/gpt2_tokenizer"
_SAMPLE_USERS, _SAMPLE_ITEMS = 5_000, 2_000


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Users with their items, and reviews of some of these pairs (rows of `words`)."""

    name: str
    num_users: int
    num_items: int
    histories: Ragged
    review_users: np.ndarray[Any, Any]
    review_items: np.ndarray[Any, Any]
    words: Ragged

    @property
    def token_space(self) -> TokenSpace:
        return TokenSpace(NUM_WORDS, self.num_users, self.num_items)

    def documents(self, prompts: Prompts) -> Documents:
        """Interaction and review documents, as prepare writes them."""
        return Documents.concat(
            [
                prompts.interactions(self.token_space, np.arange(self.num_users), self.histories),
                prompts.reviews(self.token_space, self.review_users, self.review_items, self.words),
            ]
        ).in_order()


@dataclasses.dataclass(frozen=True)
class Corpora:
    """The corpus whose histories are used, the corpus whose texts are used, and the tokenized prompts."""

    histories: Corpus
    texts: Corpus
    prompts: Prompts
    notes: tuple[str, ...]
    """One sentence for each replacement of missing data."""


def load_corpora(shared: Path) -> Corpora:
    """Beauty's histories and Musical Instruments' reviews from the folder `shared`, or the sample world if they are missing."""
    encode, notes = _encoder(shared)
    if (shared / _BEAUTY).exists() and (shared / _INSTRUMENTS).exists():
        histories = _corpus("Amazon Beauty", _rows(shared / _BEAUTY, "user", "item"), encode)
        reviews = _rows(shared / _INSTRUMENTS, "reviewerID", "asin", "reviewText")
        texts = _corpus("Amazon Musical Instruments", reviews, encode)
    else:
        notes.append(
            "The data sets were not found, so lengths are those of the sample world; set CLLM4REC_SHARED to their folder."
        )
        with tempfile.TemporaryDirectory() as folder:
            sample_world(folder, _SAMPLE_USERS, _SAMPLE_ITEMS)
            reviews = _rows(Path(folder) / "reviews.json.gz", "reviewerID", "asin", "reviewText")
            histories = texts = _corpus("sample world", reviews, encode)
    prompts = Prompts.tokenize(lambda text: encode([text])[0].tolist())
    return Corpora(histories, texts, prompts, tuple(notes))


def _rows(path: Path, *columns: str) -> Iterator[tuple[str, str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            user, item, text = (*(record[column] for column in columns), "")[:3]
            yield user, item, text


def _corpus(name: str, rows: Iterable[tuple[str, str, str]], encode: Callable[[list[str]], Ragged]) -> Corpus:
    users, items, texts = (list(column) for column in zip(*rows, strict=True))
    user_ids, user_E = np.unique(users, return_inverse=True)
    item_ids, item_E = np.unique(items, return_inverse=True)
    order = np.argsort(user_E, kind="stable")
    has_text = np.flatnonzero(np.array([bool(text) for text in texts]))
    return Corpus(
        name,
        len(user_ids),
        len(item_ids),
        Ragged.from_rows(item_E[order].astype(np.int64), user_E[order], len(user_ids)),
        user_E[has_text],
        item_E[has_text],
        encode([texts[row] for row in has_text]),
    )


def _encoder(shared: Path) -> tuple[Callable[[list[str]], Ragged], list[str]]:
    """A function texts → at most MAX_TEXT_TOKENS tokens each: those of GPT-2, or a random token per word and punctuation mark."""
    if (shared / _TOKENIZER).is_dir():
        from transformers import AutoTokenizer

        from cllm4rec.data.tokenizer import Encoder

        encoder = Encoder(AutoTokenizer.from_pretrained(str(shared / _TOKENIZER)).backend_tokenizer)
        return lambda texts: encoder.encode(texts, MAX_TEXT_TOKENS), []
    words = re.compile(r"\w+|[^\w\s]")
    rng = np.random.default_rng(0)

    def encode(texts: list[str]) -> Ragged:
        lengths = [min(MAX_TEXT_TOKENS, len(words.findall(text))) for text in texts]
        return Ragged.from_lists([rng.integers(NUM_WORDS, size=length) for length in lengths], np.int32)

    return encode, ["The GPT-2 tokenizer was not found, so each word and punctuation mark counts as one token."]
