"""The prepare stage: raw interactions and texts → `prepared/` (`cllm4rec.data.prepared` describes its files).

    validate → erased users → duplicates → threshold → k-core → catalog → split → tokenize the training texts → buckets →
    audit

This process holds the texts of the catalog and, one staging file at a time, the texts a tokenizer is trained on. All other
texts are only read by tasks.

Lengths: E interactions dataset.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import os
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cllm4rec.arrays.histories import SPLITS
from cllm4rec.arrays.ids import Catalog, TokenSpace
from cllm4rec.config import BackboneSize, Config, DataConfig, Source
from cllm4rec.data.coverage import EXAMPLES, report_coverage
from cllm4rec.data.document_files import LEAKS, Interactions, PrepareContext, read_texts, tokenize, write_buckets
from cllm4rec.data.documents import Kind
from cllm4rec.data.formats import ROLES, Layout, Role
from cllm4rec.data.ingest import Ingested, check_refused, common_reasons, ingest
from cllm4rec.data.prepared import PromptTokens, num_buckets
from cllm4rec.data.ray_data import Executor, RayExecutor
from cllm4rec.data.records import Limits
from cllm4rec.data.sources import fingerprint, inspect, source_files
from cllm4rec.data.split import TEST, TRAIN, hash_ids, k_core, last_of_pairs, shuffle_keys, split_rows
from cllm4rec.data.times import report_times
from cllm4rec.data.tokenizer import Encoder, save_tokenizer, tokenize_prompts
from cllm4rec.errors import DataError
from cllm4rec.staleness import settings_digest
from cllm4rec.storage.artifacts import Draft, Manifest, read_manifest, write_directory
from cllm4rec.storage.files import (
    absolute,
    digest_of,
    digest_of_file,
    join,
    list_files,
    remove_directory,
    write_json,
    write_table,
)
from cllm4rec.storage.tombstones import Tombstones
from cllm4rec.typing import Array

logger = logging.getLogger(__name__)


def prepare(config: Config, executor: Executor | None = None) -> Manifest:
    """Write `config.run.prepared` and return its manifest.

    Tasks run on `executor`, by default on the connected Ray cluster. The same input and config give the same bytes with
    any executor. Raises DataError or ConfigError with one sentence for input that does not fit; the directory that was
    there before then stays.
    """
    executor = executor or RayExecutor()
    layouts = [inspect(source, role, config.data.min_rating) for role, source in _sources(config.data)]
    inputs, resolved = prepare_inputs(config), config.model_dump(mode="json")
    uri = config.run.prepared
    with write_directory(uri, kind="prepared", inputs=inputs, config=resolved) as draft, executor.session():
        staging = absolute(draft.path("staging"))
        ingested = ingest(layouts, Limits.of(config.data), staging, executor)
        _quarantine(ingested, layouts, config.data, draft)
        # Read after the digest of the inputs: users who are erased meanwhile are left out, and the stage runs again.
        ingested = _without_erased(ingested, Tombstones.load(config.output_dir), draft.counts)
        dataset = _build_dataset(ingested, config.data, draft.counts)
        selected, text_files = _select_texts(dataset, ingested, layouts, draft.counts), ingested.text_files
        strangers = _strangers(dataset, ingested, layouts)
        del ingested  # its rows are most of the memory used so far
        logger.info(f"tokenizing {len(selected):,} texts")
        catalog = _write_catalog(dataset, selected, text_files, staging, draft)
        _report_coverage(catalog, strangers, draft.counts)
        context = _make_context(config, dataset, selected, text_files, staging, draft)
        spelled = tokenize(context, selected, executor)
        _audit(write_buckets(context, dataset.user_ids, dataset.interactions, executor), spelled, draft)
        remove_directory(staging)
    return read_manifest(uri, "prepared")


def check_sources(config: Config) -> None:
    """Raise DataError or ConfigError if a file of the sources is missing or does not fit; reads the first file of each."""
    for role, source in _sources(config.data):
        inspect(source, role, config.data.min_rating)


def prepare_inputs(config: Config) -> dict[str, str]:
    """Digests of everything that determines what prepare writes. The stage is up to date while its manifest has the same."""
    backbone = config.model.backbone
    tokenizer: list[Any] = ["from scratch", backbone.vocab_size] if isinstance(backbone, BackboneSize) else [backbone]
    if isinstance(backbone, str):
        tokenizer += [config.model.revision, *_tokenizer_fingerprints(backbone)]
    files = [file for role, source in _sources(config.data) for file in source_files(source, role)]
    tombstones = Tombstones.load(config.output_dir)
    expected = config.data.expected
    return {
        "data": settings_digest(config, "prepare"),
        "files": digest_of([fingerprint(file) for file in files]),
        "tokenizer": digest_of(tokenizer),
        **({"erased": tombstones.digest} if len(tombstones) else {}),
        # It changes nothing that is written, but new expected counts must be checked.
        **({"expected": digest_of(expected.model_dump())} if expected else {}),
    }


def _tokenizer_fingerprints(folder: str) -> list[tuple[str, str]]:
    """Names and digests of the small files beside the weights of a backbone; empty for a name on the hub."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in list_files(folder) if name.endswith((".json", ".txt", ".model"))]
    return [(name, digest_of_file(join(folder, name))) for name in names]


def _sources(data: DataConfig) -> list[tuple[Role, Source]]:
    """The sources that the config names, interactions first."""
    sources = [(role, getattr(data, role)) for role in ROLES]
    return [(role, source) for role, source in sources if source is not None]


def _quarantine(ingested: Ingested, layouts: list[Layout], data: DataConfig, draft: Draft) -> None:
    """Write the refused rows. Raises DataError if too many rows of a source were refused."""
    write_table(ingested.refused, draft.path("quarantine", "refused.parquet"))
    draft.counts["rows"] = {}
    for layout, rows_in, rows in zip(layouts, ingested.rows_in, ingested.rows, strict=True):
        refused = rows_in - len(rows)
        draft.counts["rows"][layout.role] = {"in": rows_in, "good": len(rows), "quarantined": refused}
        logger.info(f"{layout.role}: {rows_in:,} rows in, {len(rows):,} good, {refused:,} quarantined")
        check_refused(ingested.refused, layout, rows_in, data.max_bad_fraction)
        if layout.columns.timestamp:
            draft.counts["times"] = report_times(layout.role, layout.clock.unit, rows.time)
        if refused:
            logger.info(f"  quarantined because: {common_reasons(ingested.refused, layout)}")


def _without_erased(ingested: Ingested, tombstones: Tombstones, counts: dict[str, Any]) -> Ingested:
    """Leave out all rows of erased users. Only their number is logged."""
    if not len(tombstones):
        return ingested
    erased = np.flatnonzero(tombstones.contains(ingested.user_ids))
    rows = [source.take(np.flatnonzero(~np.isin(source.user, erased))) for source in ingested.rows]
    left_out = sum(map(len, ingested.rows)) - sum(map(len, rows))
    counts["erased"] = {"rows": left_out}
    logger.info(f"left out: {left_out:,} rows of erased users")
    return dataclasses.replace(ingested, rows=rows)


@dataclasses.dataclass(frozen=True)
class _Dataset:
    """The users, items and interactions that are kept, by index, and where the text of each interaction is staged."""

    user_ids: Array
    item_ids: Array
    user_of_code: Array
    item_of_code: Array
    """The index of each id of `Ingested`; -1 for an id that is not dataset."""
    interactions: Interactions
    text_file: Array
    text_row: Array


def _build_dataset(ingested: Ingested, data: DataConfig, counts: dict[str, Any]) -> _Dataset:
    """Apply duplicates, threshold, k-core, catalog and split. Raises DataError if no interaction is left."""
    rows = ingested.rows[0]
    latest = np.flatnonzero(last_of_pairs(rows.user, rows.item, rows.time))
    liked = latest if data.min_rating is None else latest[rows.rating[latest] > data.min_rating]
    core = liked[k_core(rows.user[liked], rows.item[liked], data.core)]
    dropped = {
        "duplicates": len(rows) - len(latest),
        "below_threshold": len(latest) - len(liked),
        "outside_core": len(liked) - len(core),
    }
    counts |= dropped
    if not len(core):
        is_rated = data.min_rating is not None
        low = f"{dropped['below_threshold']:,} not rated above data.min_rating {data.min_rating}, " if is_rated else ""
        raise DataError(
            f"no interactions are left of {len(rows):,}: {dropped['duplicates']:,} were repeated pairs, {low}and of the rest "
            f"no users and items have data.core {data.core} with each other; lower data.core"
            f"{' or data.min_rating' if is_rated else ''}"
        )
    dataset = _index_and_split(ingested, core, data)
    _count(dataset, counts)
    _check_counts(counts, data)
    return dataset


def _index_and_split(ingested: Ingested, core: Array, data: DataConfig) -> _Dataset:
    """Number the users and items of these rows by sorted id, and assign a split to each row.

    Interactions are sorted by user, time and item.
    """
    rows = ingested.rows[0]
    user_ids, user_of_code = _sorted_ids(rows.user[core], ingested.user_ids)
    item_ids, item_of_code = _sorted_ids(rows.item[core], ingested.item_ids)
    user_E, item_E, time_E = user_of_code[rows.user[core]], item_of_code[rows.item[core]], rows.time[core]
    shuffle_E = shuffle_keys(hash_ids(user_ids)[user_E], hash_ids(item_ids)[item_E], data.split.seed)
    split_E = split_rows(user_E, time_E, shuffle_E, data.split)
    order = np.lexsort((item_E, time_E, user_E))
    interactions = Interactions(user_E[order], item_E[order], split_E[order], time_E[order])
    texts = rows.text_file[core[order]], rows.text_row[core[order]]
    return _Dataset(user_ids, item_ids, user_of_code, item_of_code, interactions, *texts)


def _sorted_ids(code_E: Array, ids: Array) -> tuple[Array, Array]:
    """The ids that occur, sorted, and the index of each code among them (-1 if it does not occur)."""
    codes = np.unique(code_E)
    codes = codes[np.argsort(ids[codes])]
    index = np.full(len(ids), -1, np.int32)
    index[codes] = np.arange(len(codes))
    return ids[codes], index


def _count(dataset: _Dataset, counts: dict[str, Any]) -> None:
    interactions = dataset.interactions
    by_split = np.bincount(interactions.split, minlength=len(SPLITS)).tolist()
    num_tested = len(np.unique(interactions.user[interactions.split == TEST]))
    counts |= {
        "users": len(dataset.user_ids),
        "items": len(dataset.item_ids),
        "interactions": len(interactions.user),
        "by_split": dict(zip(SPLITS, by_split, strict=True)),
        "users_without_test": len(dataset.user_ids) - num_tested,
    }
    logger.info(
        f"left out: {counts['duplicates']:,} duplicates, {counts['below_threshold']:,} below the threshold, "
        f"{counts['outside_core']:,} outside the core"
    )
    logger.info(
        f"kept: {counts['users']:,} users x {counts['items']:,} items x {counts['interactions']:,} interactions ("
        + ", ".join(f"{count:,} {name}" for name, count in counts["by_split"].items())
        + f"; {counts['users_without_test']:,} users without test items)"
    )


def _check_counts(counts: dict[str, Any], data: DataConfig) -> None:
    """Raises DataError if `data.expected` names other numbers than were dataset."""
    if data.expected is None:
        return
    expected = data.expected.model_dump()
    if {name: counts[name] for name in expected} != expected:
        kept, wanted = (" x ".join(f"{numbers[name]:,} {name}" for name in expected) for numbers in (counts, expected))
        raise DataError(
            f"prepare kept {kept} and data.expected names {wanted}; look at the edition of the files, at data.min_rating "
            f"{'null' if data.min_rating is None else data.min_rating} (ratings strictly above it are kept) and at "
            f"data.core {data.core}"
        )


def _select_texts(dataset: _Dataset, ingested: Ingested, layouts: list[Layout], counts: dict[str, Any]) -> pa.Table:
    """The texts that a model may see, as a table for `read_texts`: reviews of training pairs, texts of items and users.

    Reviews of validation and test pairs are left out: they would leak held-out data into training.
    """
    tables = []
    for layout, rows in zip(layouts, ingested.rows, strict=True):
        if not layout.text_columns:
            continue
        if layout.role == "interactions":
            train = np.flatnonzero(dataset.interactions.split == TRAIN)
            user, item = dataset.interactions.user[train], dataset.interactions.item[train]
            tables.append(_text_table(Kind.REVIEW, user, item, dataset.text_file[train], dataset.text_row[train]))
            continue
        index = dataset.item_of_code[rows.item] if layout.role == "items" else dataset.user_of_code[rows.user]
        last = _last_occurrences(index)
        counts[f"unknown_{layout.role}"] = int((index < 0).sum())
        none = np.full(len(last), -1, np.int64)
        user, item = (none, index[last]) if layout.role == "items" else (index[last], none)
        kind = Kind.ITEM_TEXT if layout.role == "items" else Kind.USER_TEXT
        tables.append(_text_table(kind, user, item, rows.text_file[last], rows.text_row[last]))
    return pa.concat_tables(tables) if tables else _text_table(Kind.REVIEW, *[np.empty(0, np.int64)] * 4)


def _strangers(dataset: _Dataset, ingested: Ingested, layouts: list[Layout]) -> dict[Role, list[str]]:
    """For each source of items or users, the first ids in order that belong to none that is kept."""
    found: dict[Role, list[str]] = {}
    for layout, rows in zip(layouts, ingested.rows, strict=True):
        if layout.role != "interactions":
            is_item = layout.role == "items"
            code, index = (rows.item, dataset.item_of_code) if is_item else (rows.user, dataset.user_of_code)
            ids = (ingested.item_ids if is_item else ingested.user_ids)[np.unique(code[index[code] < 0])]
            found[layout.role] = heapq.nsmallest(EXAMPLES, ids.tolist())
    return found


def _report_coverage(catalog: Catalog, strangers: dict[Role, list[str]], counts: dict[str, Any]) -> None:
    sides = {"items": (catalog.item_ids, catalog.item_texts), "users": (catalog.user_ids, catalog.user_texts)}
    counts["texts"] = {role: report_coverage(role, *sides[role], strangers[role]) for role in strangers}


def _text_table(kind: Kind, user: Array, item: Array, text_file: Array, text_row: Array) -> pa.Table:
    columns = {"text_file": text_file, "text_row": text_row, "user": user, "item": item}
    return pa.table(
        {name: pa.array(column, pa.int32()) for name, column in columns.items()}
        | {"kind": pa.repeat(pa.scalar(int(kind), pa.int8()), len(user))}
    )


def _last_occurrences(index: Array) -> Array:
    """Where each index occurs last, ascending; -1 is left out."""
    found, from_end = np.unique(index[::-1], return_index=True)
    return np.sort(len(index) - 1 - from_end[found >= 0])


def _write_catalog(dataset: _Dataset, selected: pa.Table, text_files: list[str], staging: str, draft: Draft) -> Catalog:
    user_texts, item_texts = [""] * len(dataset.user_ids), [""] * len(dataset.item_ids)
    described = selected.filter(pc.not_equal(selected["kind"], int(Kind.REVIEW)))
    for rows, texts in read_texts(staging, text_files, described):
        for user, item, text in zip(rows["user"].to_pylist(), rows["item"].to_pylist(), texts, strict=True):
            if user >= 0:
                user_texts[user] = text
            else:
                item_texts[item] = text
    trained = dataset.interactions.item[dataset.interactions.split == TRAIN]
    num_train = np.bincount(trained, minlength=len(dataset.item_ids)).tolist()
    catalog = Catalog(dataset.user_ids.tolist(), dataset.item_ids.tolist(), user_texts, item_texts, num_train)
    catalog.save(draft.uri)
    return catalog


def _make_context(
    config: Config, dataset: _Dataset, selected: pa.Table, text_files: list[str], staging: str, draft: Draft
) -> PrepareContext:
    """Write the tokenizer and the prompts, and return what the tasks share."""
    texts = (text for _, texts in read_texts(staging, text_files, selected) for text in texts)
    save_tokenizer(config.model, texts, draft.path("tokenizer"))
    encoder = Encoder.load(draft.path("tokenizer"))
    prompt_tokens = PromptTokens(tokenize_prompts(encoder), encoder.num_words)
    prompt_tokens.save(draft.uri)
    draft.counts["num_words"] = prompt_tokens.num_words
    return PrepareContext(
        staging=staging,
        text_files=text_files,
        prepared=absolute(draft.uri),
        tokenizer_digest=digest_of_file(draft.path("tokenizer", "tokenizer.json")),
        prompts=prompt_tokens.prompts,
        token_space=TokenSpace(prompt_tokens.num_words, len(dataset.user_ids), len(dataset.item_ids)),
        num_buckets=num_buckets(len(dataset.user_ids)),
        max_text_tokens=config.data.max_text_tokens,
    )


def _audit(totals: Counter[str], spelled: int, draft: Draft) -> None:
    """Write and log the leakage audit. A leak is a bug of this package, so it stops the stage with an AssertionError."""
    leaks = {name: totals[name] for name in LEAKS}
    write_json(draft.path("audit.json"), leaks | {"texts_that_spell_an_id": spelled})
    for table in ("documents", "tokens"):
        kinds = {
            name.partition(".")[2]: count for name, count in sorted(totals.items()) if name.startswith(f"{table}.")
        }
        draft.counts[table] = kinds
        logger.info(f"{table}: " + ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in kinds.items()))
    logger.info(
        f"leakage audit: {leaks['pairs_in_two_splits']} pairs shared by splits, {leaks['held_out_texts']} texts of "
        f"held-out pairs, {leaks['held_out_items']} held-out items in histories, "
        f"{spelled:,} texts that spell an ID (harmless)"
    )
    assert not any(leaks.values()), f"held-out data leaked into training: {leaks}"
