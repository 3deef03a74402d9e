"""`examples.md`: for a few users of the first split the history, the test items, and the lists of three methods.

The page contains texts of the data set, including reviews, but no user ids.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from cllm4rec.arrays.ids import Catalog
from cllm4rec.config import Config
from cllm4rec.data.documents import Kind
from cllm4rec.data.prepared import load_documents, load_histories
from cllm4rec.evaluation.report import name_of
from cllm4rec.experiments.baselines.registry import BASELINES
from cllm4rec.experiments.comparison.methods import MODEL
from cllm4rec.experiments.comparison.trial import MethodRun, of_split, read_result
from cllm4rec.metrics.protocol import HeldOut
from cllm4rec.reporting import markdown_table
from cllm4rec.storage.files import join, read_bytes
from cllm4rec.training.loop import VALIDATION_METRIC
from cllm4rec.typing import IntArray

NUM_USERS, LIST_LENGTH, MOST_READ, TEXT_CHARS = 5, 10, 12, 60
POPULARITY = "popularity"
_MARKS = re.compile(r"([\\`*_\[\]|~#$])")


def examples(config: Config, metrics: Mapping[str, Any]) -> str:
    """The page, from finished method runs and the output of `collect`. The same seed gives the same page."""
    split = of_split(config, config.compare.seeds[0])
    directory = split.run.prepared
    held_out = HeldOut.test(load_histories(directory), config.evaluate.read, config.evaluate.mask)
    methods = shown_methods(metrics["results"])
    ranked = {name: read_result(MethodRun(split, name)).ranked[:, :LIST_LENGTH] for name in methods}
    users, catalog = chosen_users(held_out.num_train, config.seed), Catalog.load(directory)
    items = _shown_items(held_out, ranked, users)
    reviews = _first_reviews(directory, [item for item in items if not catalog.item_texts[item].strip()])
    names = {item: _item_name(item, catalog, reviews) for item in items}
    page = ["# Examples", _introduction(config, len(users), bool(reviews))]
    for number, row in enumerate(users.tolist(), 1):
        page += _user(number, row, held_out, ranked, names)
    return "\n\n".join(page) + "\n"


def _introduction(config: Config, num_users: int, has_reviews: bool) -> str:
    masked = config.evaluate.mask.replace("train", "training").replace("+", " and ")
    sentences = [
        f"The {num_users} users are from the split with seed {config.compare.seeds[0]}. Users with test items were grouped by "
        f"history length into {num_users} groups, and one user was drawn from each group.",
        f"The whole catalog was ranked; {masked} items were excluded. Hits are bold.",
    ]
    if has_reviews:
        sentences.append("Items without a text are shown with their first training review, in quotation marks.")
    return " ".join(sentences)


def shown_methods(results: Mapping[str, Any]) -> list[str]:
    """CLLM4Rec, the best baseline other than popularity, and popularity, if they were run."""
    others = [name for name in results if name in BASELINES and name != POPULARITY]
    best = sorted(others, key=lambda name: -results[name][VALIDATION_METRIC]["mean"])[:1]
    return [name for name in (MODEL, *best, POPULARITY) if name in results]


def chosen_users(num_train_B: IntArray, seed: int) -> IntArray:
    """Rows of a HeldOut: one random row from each of NUM_USERS groups of nearly equal size by history length, shortest first."""
    generator = np.random.default_rng(seed)
    groups = np.array_split(np.argsort(num_train_B, kind="stable"), min(NUM_USERS, len(num_train_B)))
    return np.array([generator.choice(group) for group in groups], np.int64)


def _user(
    number: int, row: int, held_out: HeldOut, ranked: Mapping[str, IntArray], names: Mapping[int, str]
) -> list[str]:
    read, relevant = held_out.read[row].tolist(), set(held_out.relevant[row].tolist())
    lists = {name: item_BK[row].tolist() for name, item_BK in ranked.items()}
    rows = [
        [str(rank + 1), *(_cell(items[rank], relevant, names) for items in lists.values())]
        for rank in range(LIST_LENGTH)
    ]
    hits = ", ".join(f"{name_of(name)} {len(relevant & set(items))}" for name, items in lists.items())
    return [
        f"## User {number}: {held_out.num_train[row]} training items",
        f"History, oldest first{f' (the last {MOST_READ} of {len(read)})' if len(read) > MOST_READ else ''}:",
        _bullets(read[-MOST_READ:], names),
        "Test items:",
        _bullets(sorted(relevant), names),
        f"Hits among the first {LIST_LENGTH}: {hits}.",
        markdown_table(["", *map(name_of, lists)], rows),
    ]


def _cell(item: int, relevant: set[int], names: Mapping[int, str]) -> str:
    if item < 0:
        return ""
    return f"**{names[item]}**" if item in relevant else names[item]


def _bullets(items: Sequence[int], names: Mapping[int, str]) -> str:
    return "\n".join(f"- {names[item]}" for item in items)


def _shown_items(held_out: HeldOut, ranked: Mapping[str, IntArray], users: IntArray) -> list[int]:
    parts = [held_out.read.take(users).values, held_out.relevant.take(users).values]
    items = np.unique(np.concatenate([*parts, *(item_BK[users].ravel() for item_BK in ranked.values())]))
    return [item for item in items.tolist() if item >= 0]


def _item_name(item: int, catalog: Catalog, reviews: Mapping[int, str]) -> str:
    """Id and shortened text, escaped for Markdown."""
    text = shortened(catalog.item_texts[item])
    if not text:
        text = f"“{shortened(reviews[item])}”" if item in reviews else "no text"
    return plain_markdown(f"{catalog.item_ids[item]}: {text}")


def _first_reviews(prepared_dir: str, items: Sequence[int]) -> dict[int, str]:
    """The first training review, by user index, of each item that has one."""
    documents = load_documents(prepared_dir)
    rows = np.flatnonzero((documents.kind == Kind.REVIEW) & np.isin(documents.item, items))
    item_D, first_D = np.unique(documents.item[rows], return_index=True)
    tokenizer = tokenizers.Tokenizer.from_buffer(read_bytes(join(prepared_dir, "tokenizer", "tokenizer.json")))
    texts = tokenizer.decode_batch(documents.main.take(rows[first_D]).tolist())
    return {item: text for item, text in zip(item_D.tolist(), texts, strict=True) if text.strip()}


def shortened(text: str) -> str:
    """One line of at most TEXT_CHARS characters, cut between words if possible."""
    line = " ".join(text.split())
    if len(line) <= TEXT_CHARS:
        return line
    head = line[: TEXT_CHARS + 1]
    return f"{head.rpartition(' ')[0] or head[:-1]} …"


def plain_markdown(text: str) -> str:
    """Text with Markdown and HTML escaped, because it comes from the data and may contain anything."""
    return _MARKS.sub(r"\\\1", html.escape(text, quote=False))
