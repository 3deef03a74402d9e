"""The prepare stage on data whose answer is known; in this process, and once on Ray with the same bytes."""

import dataclasses
import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cllm4rec.arrays.histories import SPLITS
from cllm4rec.arrays.ids import Catalog, TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import Config, parse_config
from cllm4rec.data.document_files import LEAKS, Interactions, PrepareContext, audit_bucket
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind, Prompts
from cllm4rec.data.prepare import prepare, prepare_inputs
from cllm4rec.data.prepared import bucket_of, bucket_paths, load_documents, load_histories, load_token_space
from cllm4rec.data.ray_data import LocalExecutor
from cllm4rec.data.split import TEST, TRAIN
from cllm4rec.data.tokenizer import Encoder
from cllm4rec.data.world import ParityWorld, parity_world
from cllm4rec.errors import ConfigError, DataError
from cllm4rec.storage.artifacts import Manifest, is_current, read_manifest, verify_files
from cllm4rec.storage.files import read_json, read_tables, write_table
from cllm4rec.storage.tombstones import Tombstones

PROMPTS = Prompts([1], [2], [3], [4], [5], [6], [7], [8])


def context_at(directory: Path, num_users: int, num_items: int = 4, buckets: int = 1) -> PrepareContext:
    token_space = TokenSpace(100, num_users, num_items)
    return PrepareContext(str(directory), [], str(directory), "", PROMPTS, token_space, buckets, 16)


SQUARE = [("anna", "x", 5.0, 3), ("anna", "y", 4.0, 1), ("ben", "x", 5.0, 2), ("ben", "y", 5.0, 2)]


def small_config(
    folder: Path, rows: list[tuple[str, str, float, int]], bad_lines: Sequence[str] = (), **data: Any
) -> Config:
    """The config of these interactions, written to `folder` with a text in each row that tells its place."""
    names = ("user", "item", "rating", "timestamp")
    lines = [
        json.dumps(dict(zip(names, row, strict=True)) | {"text": f"row {place}"}) for place, row in enumerate(rows)
    ]
    (folder / "a.jsonl").write_text("\n".join([*lines, *bad_lines]) + "\n")
    columns = {name: name for name in (*names, "text")}
    source = {"interactions": {"path": str(folder / "a.jsonl"), "columns": columns}, "core": 2}
    return parse_config(
        {"output_dir": str(folder / "out"), "data": source | data, "model": {"backbone": {"vocab_size": 300}}}
    )


def test_what_is_kept_is_indexed_by_id_and_sorted_by_user_and_time(tmp_path: Path) -> None:
    rows = [*SQUARE, ("anna", "z", 3.0, 9), ("cleo", "x", 5.0, 9), ("anna", "x", 4.0, 4)]
    config = small_config(tmp_path, rows)
    counts = prepare(config, LocalExecutor()).counts
    uri = config.run.prepared
    catalog = Catalog.load(uri)
    assert (catalog.user_ids.tolist(), catalog.item_ids.tolist()) == (["anna", "ben"], ["x", "y"])
    written = read_tables(bucket_paths(uri, "interactions"))
    assert written.select(["user", "item", "time"]).to_pydict() == {
        "user": [0, 0, 1, 1],
        "item": [1, 0, 0, 1],
        "time": [1, 4, 2, 2],
    }
    reviews, encoder = load_documents(uri).of_kinds([Kind.REVIEW]), Encoder.load(f"{uri}/tokenizer")
    spoken = dict(
        zip(zip(reviews.user.tolist(), reviews.item.tolist(), strict=True), reviews.main.tolist(), strict=True)
    )
    kept = {(0, 0): "row 6", (0, 1): "row 1", (1, 0): "row 2", (1, 1): "row 3"}
    assert spoken == {pair: encoder(text) for pair, text in kept.items()}, "texts come from the row that was kept"
    assert (counts["duplicates"], counts["below_threshold"], counts["outside_core"]) == (1, 1, 1)
    assert counts["users_without_test"] == 2


def test_other_counts_than_expected_stop_the_stage_and_say_where_to_look(tmp_path: Path) -> None:
    right = {"users": 2, "items": 2, "interactions": 4}
    counts = prepare(small_config(tmp_path, SQUARE, expected=right), LocalExecutor()).counts
    assert {name: counts[name] for name in right} == right
    for name in right:
        wrong = small_config(tmp_path, SQUARE, expected=right | {name: 1234})
        with pytest.raises(
            DataError, match=rf"kept 2 users x 2 items x 4 .* names .*1,234 {name}.*; look at"
        ) as caught:
            prepare(wrong, LocalExecutor())
        for word in ("edition of the files", "data.min_rating 3.0", "data.core 2"):
            assert word in str(caught.value)


def test_the_last_rating_of_a_pair_decides_whether_it_is_liked(tmp_path: Path) -> None:
    rows = [*SQUARE, ("ben", "y", 1.0, 9)]
    with pytest.raises(DataError, match="no interactions are left of 5: 1 were repeated pairs, 1 not rated above"):
        prepare(small_config(tmp_path, rows), LocalExecutor())
    assert prepare(small_config(tmp_path, rows, min_rating=None), LocalExecutor()).counts["interactions"] == 4


def test_without_a_threshold_no_rating_is_blamed_for_an_empty_result(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no interactions are left of 4: 0 were repeated pairs, and of") as caught:
        prepare(small_config(tmp_path, SQUARE, min_rating=None, core=9), LocalExecutor())
    assert str(caught.value).endswith("lower data.core")


def test_every_row_of_an_erased_user_is_left_out_and_only_their_number_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tmp_path, [*SQUARE, ("cleo", "x", 5.0, 9), ("cleo", "y", 5.0, 9)])
    Tombstones().with_users(["cleo", "nobody"]).save(config.output_dir)
    with caplog.at_level(logging.INFO, "cllm4rec"):
        counts = prepare(config, LocalExecutor()).counts
    assert Catalog.load(config.run.prepared).user_ids.tolist() == ["anna", "ben"]
    assert counts["erased"] == {"rows": 2}
    assert "left out: 2 rows of erased users" in caplog.text
    assert "cleo" not in caplog.text


def test_too_many_refused_rows_stop_the_stage_and_name_the_commonest_reasons(tmp_path: Path) -> None:
    bad = ['{"user": ', "[]", "nonsense", "7", '{"user": "\0"}', '{"item": "\0"}']
    with pytest.raises(DataError) as caught:
        prepare(small_config(tmp_path, SQUARE, bad), LocalExecutor())
    assert "6 of 10 rows of data.interactions were refused" in str(caught.value)
    assert (
        "not a JSON object (4 times, first in a.jsonl line 5), NUL character (2 times, first in a.jsonl line 9)"
        in str(caught.value)
    )
    counts = prepare(small_config(tmp_path, SQUARE, bad, max_bad_fraction=0.6), LocalExecutor()).counts
    assert counts["rows"]["interactions"] == {"in": 10, "good": 4, "quarantined": 6}


def test_of_repeated_texts_the_last_is_kept(tmp_path: Path) -> None:
    lines = [
        json.dumps({"item": item, "text": text}) for item, text in [("y", "old"), ("q", "?"), ("x", "x"), ("y", "new")]
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(lines) + "\n")
    items = {"path": str(tmp_path / "items.jsonl"), "columns": {"item": "item", "text": "text"}}
    config = small_config(tmp_path, SQUARE, items=items)
    assert prepare(config, LocalExecutor()).counts["unknown_items"] == 1
    assert Catalog.load(config.run.prepared).item_texts == ["x", "new"]


@given(st.integers(1, 500), st.integers(1, 40))
def test_buckets_begin_where_the_bucket_of_a_user_changes(num_users: int, buckets: int) -> None:
    context = context_at(Path("."), num_users, buckets=buckets)
    bounds = [context.first_user(bucket) for bucket in range(buckets + 1)]
    assert (bounds[0], bounds[-1]) == (0, num_users)
    counts = np.bincount(bucket_of(np.arange(num_users), num_users, buckets), minlength=buckets)
    assert np.diff(bounds).tolist() == counts.tolist()


@pytest.mark.parametrize("leak", [None, *LEAKS])
def test_the_audit_sees_every_kind_of_leak_in_the_written_files(tmp_path: Path, leak: str | None) -> None:
    context = context_at(tmp_path, num_users=2)
    interactions = Interactions(
        np.array([0, 0, 1]), np.array([0, 1, 2]), np.array([TRAIN, TEST, TRAIN]), np.array([1, 2, 3])
    )
    if leak == "pairs_in_two_splits":
        interactions = dataclasses.replace(interactions, item=np.array([0, 0, 2]))
    read = [[0, 1], [2]] if leak == "held_out_items" else [[0], [2]]
    reviewed = np.array([1 if leak == "held_out_texts" else 0])
    documents = Documents.concat(
        [
            PROMPTS.interactions(context.token_space, np.arange(2), Ragged.from_lists(read)),
            PROMPTS.reviews(context.token_space, np.array([0]), reviewed, Ragged.from_lists([[9, 9]])),
        ]
    )
    write_table(interactions.to_arrow(), context.path("interactions", 0))
    write_table(documents.to_arrow(), context.path("documents", 0))
    counts = audit_bucket(context, 0)
    assert (counts["documents.review"], counts["tokens.review"]) == (1, 2)
    if leak is None:
        assert not any(counts[name] for name in LEAKS)
    else:
        assert counts[leak] == 1


def config_of(folder: Path, world: Path, **data: Any) -> Config:
    columns = {"user": "user", "item": "item", "rating": "rating", "text": "text", "timestamp": "timestamp"}
    described = {
        role: {"path": f"{world}/{role}.jsonl", "columns": {role[:-1]: role[:-1], "text": "text"}}
        for role in ("items", "users")
    }
    settings = {
        "interactions": {"path": f"{world}/interactions*.jsonl", "columns": columns},
        "split": {"kind": "leave_one_out"},
        "max_bad_fraction": 0.1,
    }
    model = {"backbone": {"vocab_size": 300}}
    return parse_config({"output_dir": str(folder), "data": settings | described | data, "model": model})


def test_inputs_change_with_what_decides_the_result_and_with_nothing_else(tmp_path: Path) -> None:
    parity_world().write(str(tmp_path))
    config = config_of(tmp_path / "out", tmp_path)
    before = prepare_inputs(config)
    assert prepare_inputs(config.model_copy(update={"seed": 5, "output_dir": "elsewhere"})) == before
    changed = [config_of(tmp_path / "out", tmp_path, core=3), parse_config(config.model_dump() | {"model": {}})]
    for number, name in enumerate(("data", "tokenizer")):
        after = prepare_inputs(changed[number])
        assert [key for key in before if after[key] != before[key]] == [name]
    with (tmp_path / "items.jsonl").open("a") as stream:
        stream.write('{"item": "new", "text": "x"}\n')
    after = prepare_inputs(config)
    assert [key for key in before if after[key] != before[key]] == ["files"]


def test_expected_counts_are_checked_on_prepared_data_too_and_none_change_nothing(tmp_path: Path) -> None:
    parity_world().write(str(tmp_path))
    before = prepare_inputs(config_of(tmp_path / "out", tmp_path))
    expected = {"users": 40, "items": 20, "interactions": 400}
    after = prepare_inputs(config_of(tmp_path / "out", tmp_path, expected=expected))
    assert after.pop("expected")
    assert after == before


def test_an_erasure_is_an_input_and_none_is_none(tmp_path: Path) -> None:
    parity_world().write(str(tmp_path))
    config = config_of(tmp_path / "out", tmp_path)
    before = prepare_inputs(config)
    digests = []
    for user_id in ("user-00", "user-01"):
        Tombstones.load(config.output_dir).with_users([user_id]).save(config.output_dir)
        after = prepare_inputs(config)
        digests.append(after.pop("erased"))
        assert after == before
    assert len(set(digests)) == 2


def test_a_backbone_folder_counts_as_an_input(tmp_path: Path) -> None:
    parity_world().write(str(tmp_path))
    (tmp_path / "backbone").mkdir()
    raw = config_of(tmp_path / "out", tmp_path).model_dump() | {"model": {"backbone": str(tmp_path / "backbone")}}
    before = prepare_inputs(parse_config(raw))
    (tmp_path / "backbone" / "tokenizer.json").write_text("{}")
    assert prepare_inputs(parse_config(raw))["tokenizer"] != before["tokenizer"]


CANARY = "xylophonequartz"


def write_with_flaws(world: ParityWorld, folder: Path) -> int:
    """The parity world as raw files, and what raw files have beside it. Returns how many rows are to be refused."""
    world.write(str(folder))
    rows = [json.loads(line) for line in (folder / "interactions.jsonl").read_text().splitlines()]
    held_out = rows[9]
    held_out["text"] = CANARY
    first = rows[0]
    first["text"] += " <item_7>"
    lines = [json.dumps(row) for row in rows]
    lines += [json.dumps(first | {"timestamp": 1, "text": f"{CANARY} earlier"})]  # a repeated pair, older
    lines += [json.dumps(first | {"item": "item-99", "rating": 2.0, "text": f"{CANARY} disliked"})]
    lines += [json.dumps(first | {"user": "newcomer", "text": f"{CANARY} alone"})]
    lines += ['{"user": "user-00", ', json.dumps(first | {"rating": f"{CANARY} stars"})]
    (folder / "interactions.jsonl").write_text("\n".join(lines) + "\n")
    with (folder / "items.jsonl").open("a") as stream:
        stream.write(json.dumps({"item": "item-99", "text": CANARY}) + "\n")
    return 2


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    assert write_with_flaws(parity_world(), folder) == 2
    return folder


@pytest.fixture(scope="module")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Manifest]:
    config = config_of(tmp_path_factory.mktemp("out"), raw)
    return config, prepare(config, LocalExecutor())


def test_the_parity_world_comes_out_as_it_is(prepared: tuple[Config, Manifest]) -> None:
    config, manifest = prepared
    world, uri = parity_world(), config.run.prepared
    histories, catalog = load_histories(uri), Catalog.load(uri)
    assert histories.user.tolist() == world.histories.user.tolist()
    for split in SPLITS:
        assert getattr(histories, split).tolist() == getattr(world.histories, split).tolist()
    for name in ("user_ids", "item_ids", "user_texts", "item_texts", "item_counts"):
        assert list(getattr(catalog, name)) == list(getattr(world.catalog, name))
    facts = read_tables(bucket_paths(uri, "interactions"))
    assert facts.column_names == ["user", "item", "split", "time"]
    assert len(facts) == manifest.counts["interactions"] == 400
    keys = list(zip(*(facts[name].to_pylist() for name in ("user", "time", "item")), strict=True))
    assert keys == sorted(keys)
    ids = read_tables(bucket_paths(uri, "histories"))["user_id"].to_pylist()
    assert ids == world.catalog.user_ids.tolist()


def test_documents_hold_exactly_the_texts_that_may_be_seen(prepared: tuple[Config, Manifest]) -> None:
    config, _ = prepared
    world, uri = parity_world(), config.run.prepared
    catalog, (prompt_tokens, space) = Catalog.load(uri), load_token_space(uri)
    documents = load_documents(uri)
    tokenizer = AutoTokenizer.from_pretrained(f"{uri}/tokenizer")

    def spoken(kind: Kind) -> dict[tuple[int, int], str]:
        mine = documents.of_kinds([kind])
        pairs = zip(mine.user.tolist(), mine.item.tolist(), strict=True)
        return dict(zip(pairs, map(tokenizer.decode, mine.main.tolist()), strict=True))

    user, item, texts = world.reviews()
    reviews = dict(zip(zip(user.tolist(), item.tolist(), strict=True), texts, strict=True))
    reviews[0, int(world.histories.train[0][0])] += " <item_7>"
    assert spoken(Kind.REVIEW) == reviews
    assert spoken(Kind.USER_TEXT) == {(index, -1): text for index, text in enumerate(catalog.user_texts)}
    assert spoken(Kind.ITEM_TEXT) == {(-1, index): text for index, text in enumerate(catalog.item_texts)}
    sequences = documents.of_kinds([Kind.INTERACTIONS])
    assert space.item_index(sequences.main.values).tolist() == world.histories.train.values.tolist()
    assert sequences.user.tolist() == world.histories.user.tolist()
    words = documents.of_kinds(TEXT_KINDS)
    assert prompt_tokens.num_words == len(tokenizer) == Encoder.load(f"{uri}/tokenizer").num_words
    assert words.main.values.max() < prompt_tokens.num_words
    assert words.prompt.tolist()[0][0] == space.user_token(words.user[0])


def test_no_word_of_a_text_that_may_not_be_seen_is_left_anywhere(prepared: tuple[Config, Manifest]) -> None:
    uri = prepared[0].run.prepared
    for path in Path(uri).rglob("*"):
        if path.suffix == ".parquet":
            assert CANARY not in str(pq.read_table(path).to_pylist()), path
        elif path.is_file():
            assert CANARY not in path.read_text(encoding="utf-8"), path
    for syllable in ("xyl", "quartz"):
        assert syllable not in str(json.loads(Path(uri, "tokenizer", "tokenizer.json").read_text())["model"]["merges"])


def test_a_user_who_was_erased_is_not_prepared_again(raw: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, raw)
    Tombstones().with_users(["user-07"]).save(config.output_dir)
    manifest = prepare(config, LocalExecutor())
    uri = config.run.prepared
    assert (manifest.counts["erased"], manifest.counts["users"]) == ({"rows": 11}, 39)
    assert "user-07" not in Catalog.load(uri).user_ids
    assert len(load_documents(uri).of_kinds([Kind.USER_TEXT])) == 39
    assert not any("user-07" in str(pq.read_table(path).to_pylist()) for path in Path(uri).rglob("*.parquet"))
    assert is_current(uri, "prepared", prepare_inputs(config))


def test_every_row_is_accounted_for(prepared: tuple[Config, Manifest]) -> None:
    config, manifest = prepared
    uri, counts = config.run.prepared, manifest.counts
    assert counts["rows"]["interactions"] == {"in": 405, "good": 403, "quarantined": 2}
    assert (counts["duplicates"], counts["below_threshold"], counts["outside_core"]) == (1, 1, 1)
    assert (counts["users"], counts["items"], counts["unknown_items"]) == (40, 20, 1)
    assert counts["by_split"] == {"train": 320, "validation": 40, "test": 40}
    assert counts["documents"] == {"interactions": 40, "review": 320, "item_text": 20, "user_text": 40}
    refused = pq.read_table(f"{uri}/quarantine").to_pylist()
    assert [(row["source"], row["file"], row["line"]) for row in refused] == [
        ("interactions", "interactions.jsonl", 404),
        ("interactions", "interactions.jsonl", 405),
    ]
    assert read_json(f"{uri}/audit.json") == dict.fromkeys(LEAKS, 0) | {"texts_that_spell_an_id": 1}


def test_the_directory_is_whole_current_and_holds_no_staging(prepared: tuple[Config, Manifest]) -> None:
    config, manifest = prepared
    uri = config.run.prepared
    verify_files(uri, manifest)
    assert is_current(uri, "prepared", prepare_inputs(config))
    assert not Path(uri, "staging").exists()
    assert [path.name for path in Path(uri).parent.iterdir()] == ["prepared"]


def test_the_result_does_not_depend_on_the_order_of_rows_and_files(
    raw: Path, prepared: tuple[Config, Manifest], tmp_path: Path
) -> None:
    lines = (raw / "interactions.jsonl").read_text().splitlines()
    random.Random(0).shuffle(lines)
    for number in range(3):
        (tmp_path / f"interactions-{number}.jsonl").write_text("\n".join(lines[number::3]) + "\n")
    for name in ("items.jsonl", "users.jsonl"):
        (tmp_path / name).write_text((raw / name).read_text())
    again = prepare(config_of(tmp_path / "out", tmp_path), LocalExecutor()).files
    files = prepared[1].files
    assert again.keys() == files.keys()
    assert [name for name in files if files[name] != again[name]] == ["quarantine/refused.parquet"]


@pytest.mark.ray
def test_ray_and_this_process_write_the_same_bytes(
    prepared: tuple[Config, Manifest], tmp_path: Path, ray_local: None
) -> None:
    config, manifest = prepared
    again = prepare(config.model_copy(update={"output_dir": str(tmp_path)}))
    assert (again.digest, again.files, again.counts) == (manifest.digest, manifest.files, manifest.counts)


@pytest.mark.ray
def test_an_error_in_a_task_of_ray_is_raised_as_it_is(raw: Path, tmp_path: Path, ray_local: None) -> None:
    (tmp_path / "a.csv").write_text("user,item\n1,2\n")
    (tmp_path / "b.csv").write_text("user,thing\n1,2\n")
    headers = {"path": f"{tmp_path}/*.csv", "format": "csv", "columns": {"user": "user", "item": "item"}}
    with pytest.raises(DataError, match=r"^b.csv has the columns user, thing, but [^\n]*$"):
        prepare(config_of(tmp_path / "out", raw, interactions=headers, min_rating=None))


def test_bad_input_stops_with_one_sentence_and_leaves_what_was_there(
    raw: Path, prepared: tuple[Config, Manifest], tmp_path: Path
) -> None:
    config, manifest = prepared
    output = Path(config.output_dir)
    missing = {"items": {"path": f"{raw}/nothing.jsonl", "columns": {"item": "item", "text": "text"}}}
    text = {
        "interactions": {
            "path": f"{raw}/interactions.jsonl",
            "columns": {"user": "user", "item": "item", "rating": "text"},
        }
    }
    unequal = tmp_path / "unequal"
    unequal.mkdir()
    (unequal / "a.csv").write_text("user,item\n1,2\n")
    (unequal / "b.csv").write_text("user,thing\n1,2\n")
    headers = {"path": f"{unequal}/*.csv", "format": "csv", "columns": {"user": "user", "item": "item"}}
    for data, sentence in [
        ({"core": 11}, "lower data.core or data.min_rating"),
        ({"max_bad_fraction": 0.0}, "2 of 405 rows of data.interactions were refused"),
        (text, "rating is not a finite number"),
        (missing, "does not exist"),
        ({"interactions": headers, "min_rating": None}, "b.csv has the columns user, thing"),
    ]:
        with pytest.raises((DataError, ConfigError), match=sentence) as caught:
            prepare(config_of(output, raw, **data), LocalExecutor())
        assert "\n" not in str(caught.value)
        assert CANARY not in str(caught.value)
    assert read_manifest(config.run.prepared, "prepared") == manifest
    assert [path.name for path in output.iterdir()] == ["prepared"]


def test_texts_are_not_needed(raw: Path, tmp_path: Path) -> None:
    columns = {"user": "user", "item": "item"}
    source = {"path": f"{raw}/interactions.jsonl", "columns": columns}
    config = config_of(tmp_path, raw, interactions=source, min_rating=None, items=None, users=None)
    manifest = prepare(config, LocalExecutor())
    assert manifest.counts["documents"] == {"interactions": 40}
    assert load_histories(config.run.prepared).train.lengths.min() >= 8


def test_musical_instruments_have_the_papers_way_of_counting(shared_dir: Path, tmp_path: Path) -> None:
    path = shared_dir / "data" / "amazon_musical_instruments" / "*.json.gz"
    data = {"interactions": {"path": str(path), "format": "amazon2014"}}
    manifest = prepare(
        parse_config({"output_dir": str(tmp_path), "data": data, "model": {"backbone": {"vocab_size": 1024}}}),
        LocalExecutor(),
    )
    counts = manifest.counts
    assert (counts["users"], counts["items"], counts["interactions"]) == (526, 347, 3615)
    assert counts["users_without_test"] == 0
    assert counts["documents"]["review"] == counts["by_split"]["train"] == 2525
    histories = load_histories(f"{tmp_path}/prepared")
    assert min(histories.train.lengths.min(), histories.validation.lengths.min(), histories.test.lengths.min()) >= 1
