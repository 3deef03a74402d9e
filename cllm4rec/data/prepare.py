"""The prepare stage: raw interactions and texts → `prepared/` (see `cllm4rec.data.prepared` for what lies there).

    validate → erased users → duplicates → threshold → k-core → catalog → split → tokenize the training texts → buckets →
    audit

Texts stay out of this process but for the catalog's own and, one file at a time, those a tokenizer learns from.

Lengths: E interactions kept.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cllm4rec.arrays.histories import SPLITS
from cllm4rec.arrays.ids import Catalog, TokenSpace
from cllm4rec.config import BackboneSize, Config, DataConfig, Source
from cllm4rec.data.document_files import LEAKS, Corpus, Facts, chosen_texts, tokenize, write_buckets
from cllm4rec.data.documents import Kind
from cllm4rec.data.formats import ROLES, Layout, Role
from cllm4rec.data.ingest import Staged, quiet_data_context, stage
from cllm4rec.data.prepared import PromptTokens, num_buckets
from cllm4rec.data.records import Limits
from cllm4rec.data.sources import fingerprint, inspect, source_files
from cllm4rec.data.split import TEST, TRAIN, hash_ids, k_core, last_of_pairs, shuffle_keys, split_rows
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

Array = npt.NDArray[Any]

logger = logging.getLogger(__name__)


def prepare(config: Config) -> Manifest:
    """Run the stage and return the manifest of `config.run.prepared`. Ray must be connected.

    The same input and config give the same bytes. Raises DataError or ConfigError with one sentence for input that does
    not fit, and leaves what stood at the directory before.
    """
    layouts = [inspect(source, role, config.data.min_rating) for role, source in _sources(config.data)]
    inputs, resolved = prepare_inputs(config), config.model_dump(mode="json")
    uri = config.run.prepared
    with write_directory(uri, kind="prepared", inputs=inputs, config=resolved) as draft, quiet_data_context():
        staging = absolute(draft.path("staging"))
        staged = stage(layouts, Limits.of(config.data), staging)
        _quarantine(staged, layouts, config.data, draft)
        # Read after the inputs' digest: who is erased meanwhile is left out too, and the stage runs once more.
        staged = _without_erased(staged, Tombstones.load(config.output_dir), draft.counts)
        kept = _keep(staged, config.data, draft.counts)
        chosen, fragments = _choose_texts(kept, staged, layouts, draft.counts), staged.fragments
        del staged  # the rows: most of what this process has held so far
        logger.info(f"tokenizing {len(chosen):,} texts")
        _write_catalog(kept, chosen, fragments, staging, draft)
        corpus = _corpus(config, kept, chosen, fragments, staging, draft)
        spelled = tokenize(corpus, chosen)
        _audit(write_buckets(corpus, kept.user_ids, kept.facts), spelled, draft)
        remove_directory(staging)
    return read_manifest(uri, "prepared")


def prepare_inputs(config: Config) -> dict[str, str]:
    """Digests of all that decides what prepare writes: the stage is current while they equal its manifest's."""
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
        # It decides nothing that is written, but numbers that were not checked yet have to be.
        **({"expected": digest_of(expected.model_dump())} if expected else {}),
    }


def _tokenizer_fingerprints(folder: str) -> list[tuple[str, str]]:
    """Names and digests of the small files beside a backbone's weights; nothing for a name on the hub."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in list_files(folder) if name.endswith((".json", ".txt", ".model"))]
    return [(name, digest_of_file(join(folder, name))) for name in names]


def _sources(data: DataConfig) -> list[tuple[Role, Source]]:
    """The sources that are given, interactions first."""
    sources = [(role, getattr(data, role)) for role in ROLES]
    return [(role, source) for role, source in sources if source is not None]


def _quarantine(staged: Staged, layouts: list[Layout], data: DataConfig, draft: Draft) -> None:
    """Write what was refused, and stop where that is too much of a source."""
    write_table(staged.refused, draft.path("quarantine", "refused.parquet"))
    draft.counts["rows"] = {}
    for layout, rows_in, rows in zip(layouts, staged.rows_in, staged.rows, strict=True):
        refused = rows_in - len(rows)
        draft.counts["rows"][layout.role] = {"in": rows_in, "good": len(rows), "quarantined": refused}
        logger.info(f"{layout.role}: {rows_in:,} rows in, {len(rows):,} good, {refused:,} quarantined")
        if refused > data.max_bad_fraction * rows_in:
            raise DataError(
                f"{refused:,} of {rows_in:,} rows of data.{layout.role} were refused, more than data.max_bad_fraction "
                f"{data.max_bad_fraction} allows: {_commonest(staged.refused, layout)}; correct the files or the config"
            )
        if refused:
            logger.info(f"  quarantined because: {_commonest(staged.refused, layout)}")


def _commonest(refused: pa.Table, layout: Layout, most: int = 3) -> str:
    """The commonest reasons, how often, and where each first stands."""
    mine = refused.filter(pc.equal(refused["source"], layout.role))
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(mine["reason"]).to_pylist()}
    sentences = []
    for reason in sorted(counts, key=lambda reason: (-counts[reason], reason))[:most]:
        first = mine.slice(pc.index(mine["reason"], reason).as_py(), 1).to_pylist()[0]
        sentences.append(f"{reason} ({counts[reason]:,} times, first in {first['file']} line {first['line']})")
    return ", ".join(sentences)


def _without_erased(staged: Staged, tombstones: Tombstones, counts: dict[str, Any]) -> Staged:
    """Leave out every row of an erased user; only their number is told."""
    if not len(tombstones):
        return staged
    erased = np.flatnonzero(tombstones.contains(staged.user_ids))
    rows = [source.take(np.flatnonzero(~np.isin(source.user, erased))) for source in staged.rows]
    left_out = sum(map(len, staged.rows)) - sum(map(len, rows))
    counts["erased"] = {"rows": left_out}
    logger.info(f"left out: {left_out:,} rows of erased users")
    return dataclasses.replace(staged, rows=rows)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What is left after the rules: facts about users and items by index, and where the text of each fact lies."""

    user_ids: Array
    item_ids: Array
    user_of_code: Array
    item_of_code: Array
    """Index of each id code of `Staged`, -1 where the id was left out."""
    facts: Facts
    fragment: Array
    place: Array


def _keep(staged: Staged, data: DataConfig, counts: dict[str, Any]) -> _Kept:
    """Duplicates, threshold, k-core, catalog and split. Raises DataError where nothing is left."""
    rows = staged.rows[0]
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
        raise DataError(
            f"no interactions are left of {len(rows):,}: {dropped['duplicates']:,} were repeated pairs, "
            f"{dropped['below_threshold']:,} not rated above data.min_rating {data.min_rating}, and of the rest no "
            f"users and items have data.core {data.core} with each other; lower data.core or data.min_rating"
        )
    kept = _indexed(staged, core, data)
    _count_facts(kept, counts)
    _check_counts(counts, data)
    return kept


def _indexed(staged: Staged, core: Array, data: DataConfig) -> _Kept:
    """Give the users and items of these rows their indices (sorted by id) and every row its split, in the order user,
    time, item.
    """
    rows = staged.rows[0]
    user_ids, user_of_code = _cataloged(rows.user[core], staged.user_ids)
    item_ids, item_of_code = _cataloged(rows.item[core], staged.item_ids)
    user_E, item_E, time_E = user_of_code[rows.user[core]], item_of_code[rows.item[core]], rows.time[core]
    shuffle_E = shuffle_keys(hash_ids(user_ids)[user_E], hash_ids(item_ids)[item_E], data.split.seed)
    split_E = split_rows(user_E, time_E, shuffle_E, data.split)
    order = np.lexsort((item_E, time_E, user_E))
    facts = Facts(user_E[order], item_E[order], split_E[order], time_E[order])
    place = core[order]
    return _Kept(user_ids, item_ids, user_of_code, item_of_code, facts, rows.fragment[place], rows.place[place])


def _cataloged(code_E: Array, ids: Array) -> tuple[Array, Array]:
    """The ids that occur, sorted, and the index of every code."""
    codes = np.unique(code_E)
    codes = codes[np.argsort(ids[codes])]
    index = np.full(len(ids), -1, np.int32)
    index[codes] = np.arange(len(codes))
    return ids[codes], index


def _count_facts(kept: _Kept, counts: dict[str, Any]) -> None:
    facts = kept.facts
    by_split = np.bincount(facts.split, minlength=len(SPLITS)).tolist()
    tested = len(np.unique(facts.user[facts.split == TEST]))
    counts |= {
        "users": len(kept.user_ids),
        "items": len(kept.item_ids),
        "interactions": len(facts.user),
        "by_split": dict(zip(SPLITS, by_split, strict=True)),
        "users_without_test": len(kept.user_ids) - tested,
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
    """Raises DataError where `data.expected` names other numbers than were kept."""
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


def _choose_texts(kept: _Kept, staged: Staged, layouts: list[Layout], counts: dict[str, Any]) -> pa.Table:
    """The texts a model may see (as `chosen_texts` reads them): reviews of training pairs, items' and users' texts.

    Leaving out the reviews of held-out pairs is the leak rule.
    """
    tables = []
    for layout, rows in zip(layouts, staged.rows, strict=True):
        if not layout.text_columns:
            continue
        if layout.role == "interactions":
            train = np.flatnonzero(kept.facts.split == TRAIN)
            user, item = kept.facts.user[train], kept.facts.item[train]
            tables.append(_chosen(Kind.REVIEW, user, item, kept.fragment[train], kept.place[train]))
            continue
        index = kept.item_of_code[rows.item] if layout.role == "items" else kept.user_of_code[rows.user]
        last = _last_of_each(index)
        counts[f"unknown_{layout.role}"] = int((index < 0).sum())
        none = np.full(len(last), -1, np.int64)
        user, item = (none, index[last]) if layout.role == "items" else (index[last], none)
        kind = Kind.ITEM_TEXT if layout.role == "items" else Kind.USER_TEXT
        tables.append(_chosen(kind, user, item, rows.fragment[last], rows.place[last]))
    return pa.concat_tables(tables) if tables else _chosen(Kind.REVIEW, *[np.empty(0, np.int64)] * 4)


def _chosen(kind: Kind, user: Array, item: Array, fragment: Array, place: Array) -> pa.Table:
    columns = {"fragment": fragment, "place": place, "user": user, "item": item}
    return pa.table(
        {name: pa.array(column, pa.int32()) for name, column in columns.items()}
        | {"kind": pa.repeat(pa.scalar(int(kind), pa.int8()), len(user))}
    )


def _last_of_each(index: Array) -> Array:
    """Places of the last occurrence of every index, -1 left out."""
    backwards = index[::-1]
    found, place = np.unique(backwards, return_index=True)
    return np.sort(len(index) - 1 - place[found >= 0])


def _write_catalog(kept: _Kept, chosen: pa.Table, fragments: list[str], staging: str, draft: Draft) -> None:
    user_texts, item_texts = [""] * len(kept.user_ids), [""] * len(kept.item_ids)
    described = chosen.filter(pc.not_equal(chosen["kind"], int(Kind.REVIEW)))
    for rows, texts in chosen_texts(staging, fragments, described):
        for user, item, text in zip(rows["user"].to_pylist(), rows["item"].to_pylist(), texts, strict=True):
            if user >= 0:
                user_texts[user] = text
            else:
                item_texts[item] = text
    trained = kept.facts.item[kept.facts.split == TRAIN]
    num_train = np.bincount(trained, minlength=len(kept.item_ids)).tolist()
    Catalog(kept.user_ids.tolist(), kept.item_ids.tolist(), user_texts, item_texts, num_train).save(draft.uri)


def _corpus(config: Config, kept: _Kept, chosen: pa.Table, fragments: list[str], staging: str, draft: Draft) -> Corpus:
    """Write the tokenizer and the prompts, and gather what the tasks need to know."""
    texts = (text for _, texts in chosen_texts(staging, fragments, chosen) for text in texts)
    save_tokenizer(config.model, texts, draft.path("tokenizer"))
    encoder = Encoder.load(draft.path("tokenizer"))
    prompt_tokens = PromptTokens(tokenize_prompts(encoder), encoder.num_words)
    prompt_tokens.save(draft.uri)
    draft.counts["num_words"] = prompt_tokens.num_words
    return Corpus(
        staging=staging,
        fragments=fragments,
        prepared=absolute(draft.uri),
        tokenizer_digest=digest_of_file(draft.path("tokenizer", "tokenizer.json")),
        prompts=prompt_tokens.prompts,
        space=TokenSpace(prompt_tokens.num_words, len(kept.user_ids), len(kept.item_ids)),
        buckets=num_buckets(len(kept.user_ids)),
        max_text_tokens=config.data.max_text_tokens,
    )


def _audit(totals: Counter[str], spelled: int, draft: Draft) -> None:
    """Print and save the leakage audit; a leak would be our mistake, and stops the stage."""
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
