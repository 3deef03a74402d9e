"""The tokenizer of the backbone. Prepare writes it once; later it is read with `tokenizers`, without transformers.

    save_tokenizer(config.model, texts, directory)      the backbone's own, or a byte-level BPE trained on `texts`
    encoder = Encoder.load(directory)                   texts → word tokens, all below encoder.num_words (N)
    prompts = tokenize_prompts(encoder)

No text can produce a special token: their spellings are split while encoding, and remaining special tokens are dropped.
ID tokens are never added to a tokenizer; they are integers that are inserted afterwards (see `Prompts`).
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from cllm4rec.arrays.ragged import Ragged, slices
from cllm4rec.config import BackboneSize, ModelConfig
from cllm4rec.data.documents import Prompts
from cllm4rec.errors import ConfigError
from cllm4rec.storage.files import copy_file, join, read_bytes
from cllm4rec.storage.hub import tokenizer_folder

END_OF_TEXT = "<|endoftext|>"
BATCH = 1024
"""Texts encoded at a time: an encoding takes far more memory than its tokens."""
CHARS_PER_TOKEN = 8
"""Characters of a long text that are tokenized first for each token that is wanted; more if they are not enough."""
MARGIN = 32
"""Tokens before a cut that may depend on what follows it."""


class Encoder:
    """Texts → word tokens, all of them below `num_words` (N)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.num_words: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = np.array(sorted(token for token, word in added.items() if word.special), np.int64)
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, directory: str) -> Encoder:
        """Read `tokenizer.json` in a folder or URI. Raises ArtifactError if it is missing."""
        return cls(tokenizers.Tokenizer.from_buffer(read_bytes(join(directory, "tokenizer.json"))))

    def __call__(self, text: str) -> list[int]:
        tokens: list[int] = self.encode([text])[0].tolist()
        return tokens

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Ragged:
        """The word tokens of each text, at most `max_tokens` of each.

        Of a long text only the beginning is tokenized: a megabyte takes a second and 66 MB.
        """
        if max_tokens is None:
            return self._words(texts)
        words = self._first_words(texts, max_tokens + MARGIN, CHARS_PER_TOKEN * (max_tokens + MARGIN))
        return words.where(words.places < max_tokens)

    def _first_words(self, texts: Sequence[str], num_tokens: int, chars: int) -> Ragged:
        """The word tokens of the beginnings of the texts, `num_tokens` or more of a text that has as many."""
        words = self._words([text[:chars] for text in texts])
        short = np.flatnonzero((words.lengths < num_tokens) & (np.array([len(text) for text in texts]) > chars))
        if not len(short):
            return words
        longer = self._first_words([texts[row] for row in short.tolist()], num_tokens, 4 * chars)
        rows = np.arange(len(texts))
        rows[short] = len(texts) + np.arange(len(short))
        return Ragged.concat([words, longer]).take(rows)

    def _words(self, texts: Sequence[str]) -> Ragged:
        if not texts:
            return Ragged.empty(0)
        words = Ragged.concat([self._tokens(texts[part]) for part in slices(len(texts), BATCH)])
        # A SentencePiece vocabulary contains its special tokens as ordinary pieces too, so splitting is not enough.
        return words.where(~np.isin(words.values, self.special_tokens))

    def _tokens(self, texts: Sequence[str]) -> Ragged:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return Ragged.from_lists([encoding.ids for encoding in encodings], np.int32)


def tokenize_prompts(encoder: Encoder) -> Prompts:
    """Tokenize the words of the prompts. Raises ConfigError if the tokenizer has no tokens for one of them."""
    prompts = Prompts.tokenize(encoder)
    empty = [name for name, tokens in dataclasses.asdict(prompts).items() if not tokens]
    if empty:
        raise ConfigError(
            f"the backbone's tokenizer has no tokens for the words of the prompts ({', '.join(empty)}); "
            "use another model.backbone"
        )
    return prompts


def save_tokenizer(model: ModelConfig, texts: Iterable[str], directory: str) -> None:
    """Write the tokenizer of `model.backbone` to a folder or URI, as `save_pretrained` does.

    A backbone built from scratch gets a byte-level BPE that is trained on `texts`; the same texts give the same bytes. For
    other backbones `texts` is not read. Raises ConfigError for a backbone that is not found or has no fast tokenizer.
    """
    backbone = model.backbone
    if isinstance(backbone, BackboneSize):
        tokenizer = _train(texts, backbone.vocab_size)
    else:
        tokenizer = _pretrained(backbone, model.revision)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if not os.path.exists(os.path.join(folder, "tokenizer.json")):
            raise ConfigError(f"model.backbone {backbone} has no fast tokenizer (tokenizer.json); convert it first")
        for name in sorted(os.listdir(folder)):
            copy_file(os.path.join(folder, name), join(directory, name))


def _train(texts: Iterable[str], vocab_size: int) -> Any:
    from transformers import (
        PreTrainedTokenizerFast,
    )  # takes seconds to import, and readers of a finished tokenizer never need it

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _pretrained(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    folder = tokenizer_folder(name, revision)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        words = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the tokenizer of the backbone {name!r} cannot be loaded ({words}); use a folder or a model with a tokenizer "
            "that transformers reads without running code"
        ) from None
