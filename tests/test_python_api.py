"""Data sets from DataFrames and Arrow tables: the same directory as from files, and errors that say what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from support.parity import parity_frames

import cllm4rec
from cllm4rec.arrays.ids import Catalog
from cllm4rec.config import load_config, parse_config
from cllm4rec.data import prepare as stage
from cllm4rec.data.prepared import load_histories
from cllm4rec.data.ray_data import LocalExecutor
from cllm4rec.data.world import parity_world
from cllm4rec.errors import ConfigError, DataError
from cllm4rec.evaluation.promotion import promote
from cllm4rec.pipeline import EVALUATE
from cllm4rec.python_api import prepare
from cllm4rec.stages import run_stage
from cllm4rec.storage.artifacts import is_current, read_manifest
from cllm4rec.storage.files import digest_of_file

SETTINGS = {"data.split.kind": "leave_one_out", "data.core": 2, "model.backbone.vocab_size": 300}


@dataclasses.dataclass(frozen=True)
class Frames:
    interactions: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    parity_world().write(str(folder))
    return folder


@pytest.fixture(scope="module")
def frames(folder: Path) -> Frames:
    roles = ("interactions", "items", "users")
    return Frames(*(pd.read_json(folder / f"{role}.jsonl", lines=True, convert_dates=False) for role in roles))


@pytest.fixture(scope="module")
def digest(folder: Path) -> str:
    """Of the parity world prepared from files."""
    names = {
        "interactions": ("user", "item", "rating", "text", "timestamp"),
        "items": ("item", "text"),
        "users": ("user", "text"),
    }
    sources = {
        role: {"path": str(folder / f"{role}.jsonl"), "columns": {name: name for name in columns}}
        for role, columns in names.items()
    }
    data = {**sources, "split": {"kind": "leave_one_out"}, "core": 2}
    model = {"backbone": {"vocab_size": 300}}
    config = parse_config({"output_dir": str(folder / "files"), "data": data, "model": model})
    return stage.prepare(config, LocalExecutor()).digest


def prepared_digest(*tables: Any, output_dir: Path, **arguments: Any) -> str:
    config = prepare(*tables, output_dir=str(output_dir), settings=SETTINGS, **arguments)
    return read_manifest(config.run.prepared, "prepared").digest


def test_frames_give_the_directory_that_files_give(frames: Frames, digest: str, tmp_path: Path) -> None:
    tables = (frames.interactions, frames.items, frames.users)
    assert prepared_digest(*tables, output_dir=tmp_path / "pandas") == digest
    assert prepared_digest(*map(pa.Table.from_pandas, tables), output_dir=tmp_path / "arrow") == digest


def test_other_forms_of_the_same_values_give_the_same_directory(frames: Frames, digest: str, tmp_path: Path) -> None:
    interactions = frames.interactions.assign(
        timestamp=pd.to_datetime(frames.interactions["timestamp"], unit="s"),
        user=frames.interactions["user"].astype("category"),
        rating=frames.interactions["rating"].astype(int),
        extra=[{"not": "read"}] * len(frames.interactions),
    )
    interactions.index = pd.Index(range(7, 7 + len(interactions)))
    renamed = interactions.rename(columns={"user": "reader", "item": "book", "text": "note", "timestamp": "when"})
    items = frames.items["text"].str.split(" ", n=1, expand=True).set_axis(["title", "blurb"], axis=1)
    columns = {
        "interactions": {"user": "reader", "item": "book", "text": "note", "timestamp": "when"},
        "items": {"text": ["title", "blurb"]},
    }
    assert (
        prepared_digest(
            renamed,
            items.assign(item=frames.items["item"]),
            frames.users,
            output_dir=tmp_path,
            columns=columns,
        )
        == digest
    )


def test_the_written_config_is_the_one_returned_and_the_stage_is_up_to_date(
    frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = prepare(frames.interactions, output_dir="mine", settings=SETTINGS)
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "mine" / "config.yaml") == config
    assert is_current(config.run.prepared, "prepared", stage.prepare_inputs(config))
    created = read_manifest(config.run.prepared, "prepared")
    again = prepare(frames.interactions, output_dir=str(tmp_path / "mine"), settings={**SETTINGS, "pretrain.epochs": 3})
    assert (again.pretrain.epochs, again.data) == (3, config.data)
    assert read_manifest(again.run.prepared, "prepared") == created, "it was not prepared again"
    fewer = prepare(frames.interactions.iloc[:200], output_dir=str(tmp_path / "mine"), settings=SETTINGS)
    assert read_manifest(fewer.run.prepared, "prepared").counts["interactions"] == 200


def test_without_ratings_every_row_counts_and_whole_numbers_are_ids(tmp_path: Path) -> None:
    users, items = np.divmod(np.arange(20), 5)
    config = prepare(pd.DataFrame({"user": users, "item": items + 100}), output_dir=str(tmp_path), settings=SETTINGS)
    assert config.data.min_rating is None
    assert Catalog.load(config.run.prepared).item_ids.tolist() == ["100", "101", "102", "103", "104"]
    assert load_histories(config.run.prepared).train.lengths.tolist() == [3, 3, 3, 3]


class Exported:
    """What only exports Arrow, as frames of Polars and relations of DuckDB do, with string views."""

    def __init__(self, table: pa.Table) -> None:
        views = [
            field.with_type(pa.string_view()) if pa.types.is_string(field.type) else field for field in table.schema
        ]
        self._table = table.cast(pa.schema(views))

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


def test_a_frame_of_another_library_gives_the_directory_that_files_give(
    frames: Frames, digest: str, tmp_path: Path
) -> None:
    tables = (frames.interactions, frames.items, frames.users)
    exported = [Exported(pa.Table.from_pandas(frame, preserve_index=False)) for frame in tables]
    assert prepared_digest(*exported, output_dir=tmp_path) == digest


def test_ids_that_became_floats_are_whole_numbers_again_and_times_have_a_unit(tmp_path: Path) -> None:
    users, items = np.divmod(np.arange(20), 5)
    frame = pd.DataFrame({"user": users.astype(float), "item": items, "timestamp": 1_600_000_000_000 + items})
    settings = SETTINGS | {"data.interactions.time_unit": "ms"}
    config = prepare(frame, output_dir=str(tmp_path), settings=settings)
    assert Catalog.load(config.run.prepared).user_ids.tolist() == ["0", "1", "2", "3"]
    assert read_manifest(config.run.prepared, "prepared").counts["times"] == {"without": 0, "late": 0, "early": 0}
    assert load_config(tmp_path / "config.yaml").data.interactions.time_unit == "ms"


GOOD = pd.DataFrame({"user": ["a", "b"], "item": ["x", "y"]})
BY_BOOK = pd.DataFrame({"user": ["a"], "book": ["x"]})


@pytest.mark.parametrize(
    ("interactions", "arguments", "sentence"),
    [
        (BY_BOOK, {}, r"interactions has no column 'item'; it has user, book. Rename one, or name it in .*columns="),
        (GOOD.iloc[:0], {}, "interactions has no rows"),
        (GOOD[["user"]].assign(item=[0.5, 1.5]), {}, "column 'item' of interactions is of type double; ids must be"),
        (GOOD.assign(user=["a", 1]), {}, "interactions has a column with values of several types"),
        ([("a", "x")], {}, "interactions is of type list; pass a pandas DataFrame, an Arrow table"),
        (GOOD.set_axis(["user", "user"], axis=1), {}, "interactions has the column 'user' more than once"),
        (pa.table([["a"], ["b"], ["x"]], ["user", "user", "item"]), {}, "has the column 'user' more than once"),
        (GOOD, {"items": GOOD}, "items has no column 'text'; it has user, item"),
        (GOOD, {"columns": {"interactions": {"rating": "stars"}}}, "interactions has no column 'stars'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_a_sentence(
    interactions: Any, arguments: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=sentence):
        prepare(interactions, output_dir=str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"settings": {"data.cores": 2}}, "data.cores is not a setting"),
        ({"settings": {"output_dir": "x"}}, "settings may not hold 'output_dir'"),
        ({"settings": {"data.items.path": "x"}}, "settings may not hold 'data.items.path'"),
        ({"settings": {"data": {"core": 2}}}, "settings may not hold 'data'"),
        ({"settings": {"seed": 1, "seed.more": 2}}, "the setting 'seed.more' goes through 'seed'"),
        (
            {"columns": {"users": {"user": "name"}}},
            "columns has the key 'users'; its keys should be among interactions",
        ),
        ({"columns": {"interactions": {"stars": "rating"}}}, "names 'stars'; what it can name is user, item, rating"),
        ({"columns": {"interactions": {"user": ["a", "b"]}}}, "should be the name of a column, and is"),
        ({"columns": {"interactions": "user"}}, "should map user, item, rating, text, timestamp to column names"),
    ],
)
def test_settings_and_columns_that_do_not_fit_are_refused_in_a_sentence(
    arguments: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        prepare(GOOD, output_dir=str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


SMALL = {
    "data.core": 2,
    "data.max_text_tokens": 24,
    "model.max_tokens": 64,
    "model.backbone": {"layers": 1, "width": 32, "heads": 2, "vocab_size": 300},
    "pretrain.warmup_epochs": 1,
    "pretrain.epochs": 2,
    "finetune.epochs": 2,
    "training.bf16": False,
}


def test_frames_become_a_recommender_and_what_is_up_to_date_is_not_trained_again(tmp_path, caplog):
    caplog.set_level("INFO", logger="cllm4rec")
    interactions, items = parity_frames()
    config = cllm4rec.prepare(interactions, items, output_dir=tmp_path / "run", settings=SMALL)
    recommender = cllm4rec.train(config)
    user_id = interactions["user"].iloc[0]
    found = recommender.recommend(user_id=user_id, k=3)
    assert len(found) == 3
    assert not {item_id for item_id, _, _ in found} & set(interactions.loc[interactions["user"] == user_id, "item"])
    caplog.clear()
    again = cllm4rec.train(cllm4rec.prepare(interactions, items, output_dir=tmp_path / "run", settings=SMALL))
    assert caplog.text.count("up to date, skipped") == 4
    assert again.recommend(user_id=user_id, k=3) == found


def test_a_model_may_be_trained_on_everything_and_is_then_not_evaluated(tmp_path, caplog):
    caplog.set_level("INFO", logger="cllm4rec")
    interactions, items = parity_frames()
    everything = SMALL | {"data.split.test": 0, "data.split.validation": 0}
    config = cllm4rec.prepare(interactions, items, output_dir=tmp_path / "run", settings=everything)
    recommender = cllm4rec.train(config)
    user_id = interactions["user"].iloc[0]
    assert len(recommender.recommend(user_id=user_id, k=3)) == 3
    assert caplog.text.count("no item is held out for validation (data.split.validation), so all 2 epochs run") == 2
    counts = read_manifest(config.run.prepared, "prepared").counts
    assert counts["by_split"] == {"train": counts["interactions"], "validation": 0, "test": 0}
    for force in (False, True):
        caplog.clear()
        result = run_stage(EVALUATE, config, force)
        assert result["skipped"]
        assert result["report"] is None
        assert "evaluate: skipped: data.split.test is 0" in caplog.text
    assert not Path(config.run.evaluation).exists()
    with pytest.raises(ConfigError, match=r"cannot be compared: data\.split\.test is 0.* score and serve use model/"):
        promote(config)


def test_training_a_name_instead_of_a_config_is_refused():
    with pytest.raises(ConfigError, match=r"train takes a config and got 'demo'; pass .* cllm4rec\.load_config"):
        cllm4rec.train("demo")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_training_in_this_process_gives_the_bits_of_a_worker_of_ray(tmp_path, monkeypatch):
    """Plain torch here against DeepSpeed in a worker of Ray Train."""
    from cllm4rec.pipeline import STAGES

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    interactions, items = parity_frames()
    settings = SMALL | {"cluster.threads_per_worker": 1}
    digests = []
    for name in ("here", "ray"):
        config = cllm4rec.prepare(interactions, items, output_dir=tmp_path / name, settings=settings)
        if name == "here":
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            cllm4rec.train(config)
            torch.set_num_threads(threads)
        else:
            for stage in ("backbone", "pretrain", "finetune"):
                run_stage(STAGES[stage], config, force=False)
        digests.append(
            [digest_of_file(f"{config.run.directory(kind)}/tables.safetensors") for kind in ("pretrained", "model")]
        )
    assert digests[0] == digests[1]
