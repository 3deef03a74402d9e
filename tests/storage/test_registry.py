"""Promoted models: copied and verified, then pointed to; the pointer never names what is not whole."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from cllm4rec.config import Config, parse_config
from cllm4rec.errors import ArtifactError
from cllm4rec.storage import files, registry
from cllm4rec.storage.artifacts import MANIFEST, read_manifest, verify_files, write_directory
from cllm4rec.storage.registry import current_model, promote_directory, promoted_directories, read_pointer, rollback


@pytest.fixture(params=["local", "memory"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    output_dir = str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"
    return config_of(output_dir)


def config_of(output_dir: str, keep: int = 3) -> Config:
    return parse_config(
        {"output_dir": output_dir, "data": {"interactions": {"path": "none"}}, "promote": {"keep": keep}}
    )


def train(config: Config, text: str) -> str:
    """A candidate; returns its digest."""
    with write_directory(config.run.model, kind="model", inputs={}, config={}) as draft:
        files.write_bytes(draft.path("tables.safetensors"), text.encode())
        files.write_bytes(draft.path("backbone", "config.json"), b"{}")
        files.write_bytes(draft.path("metrics.jsonl"), b"")
    return read_manifest(config.run.model, "model").digest


def promote(config: Config, text: str) -> str:
    return promote_directory(config.output_dir, train(config, text), "a test", keep=config.promote.keep).current


def text_of(uri: str) -> str:
    verify_files(uri, read_manifest(uri, "model"))
    return files.read_bytes(files.join(uri, "tables.safetensors")).decode()


def test_the_candidate_answers_until_a_model_is_promoted(config: Config) -> None:
    train(config, "one")
    assert current_model(config.output_dir) == config.run.model
    promote_directory(config.output_dir, train(config, "one"), "the first", keep=config.promote.keep)
    assert current_model(config.output_dir) != config.run.model


def test_promoted_model_is_a_copy_that_a_new_training_leaves_alone(config: Config) -> None:
    promote(config, "one")
    digest = train(config, "two")
    assert text_of(current_model(config.output_dir)) == "one"
    pointer = promote_directory(config.output_dir, digest, "better", keep=config.promote.keep)
    assert text_of(current_model(config.output_dir)) == "two"
    assert (pointer.why, len(pointer.previous)) == ("better", 1)
    assert pointer.current.endswith(f"Z-{digest[:12]}")
    assert read_pointer(config.output_dir) == pointer
    assert files.list_files(current_model(config.output_dir)) == files.list_files(config.run.model)


def test_a_flipped_bit_in_the_copy_is_refused_and_the_old_model_stays(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(config, "one")
    digest, copy = train(config, "two"), files.copy_file

    def flip(source: str, target: str) -> None:
        copy(source, target)
        if target.endswith("tables.safetensors"):
            files.write_bytes(target, b"twp")

    monkeypatch.setattr(files, "copy_file", flip)
    with pytest.raises(ArtifactError, match="is damaged"):
        promote_directory(config.output_dir, digest, "better", keep=config.promote.keep)
    assert text_of(current_model(config.output_dir)) == "one"
    assert promoted_directories(config.output_dir) == [current_model(config.output_dir)]


def test_a_damaged_candidate_is_refused(config: Config) -> None:
    digest = train(config, "one")
    files.write_bytes(f"{config.run.model}/tables.safetensors", b"onf")
    with pytest.raises(ArtifactError, match="is damaged"):
        promote_directory(config.output_dir, digest, "the first", keep=config.promote.keep)
    assert read_pointer(config.output_dir) is None


def test_another_candidate_than_the_judged_one_is_refused(config: Config) -> None:
    judged = train(config, "one")
    train(config, "two")
    with pytest.raises(ArtifactError, match="was replaced meanwhile"):
        promote_directory(config.output_dir, judged, "the first", keep=config.promote.keep)


def test_a_candidate_replaced_during_the_copy_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, copy = train(config, "one"), files.copy_file

    def train_before_the_last(source: str, target: str) -> None:
        if target.endswith(MANIFEST):
            train(config, "two")
        copy(source, target)

    monkeypatch.setattr(files, "copy_file", train_before_the_last)
    with pytest.raises(ArtifactError, match="was replaced while it was copied"):
        promote_directory(config.output_dir, digest, "the first", keep=config.promote.keep)
    assert promoted_directories(config.output_dir) == []


class Killed(BaseException):
    """What nothing catches, as a SIGKILL."""


def test_a_crash_anywhere_leaves_the_old_model_current_and_the_next_promotion_cleans_up(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(config, "one")
    digest = train(config, "two")
    stops = 0
    while True:
        steps, stopped = 0, False

        def step(plain: Any, stops: int = stops) -> Any:
            def stepping(*args: Any) -> None:
                nonlocal steps, stopped
                if steps == stops:
                    stopped = True
                    raise Killed
                steps += 1
                plain(*args)

            return stepping

        with monkeypatch.context() as patch:
            patch.setattr(files, "copy_file", step(files.copy_file))
            patch.setattr(files, "replace_json", step(files.replace_json))
            try:
                promote_directory(config.output_dir, digest, "better", keep=config.promote.keep)
            except Killed:
                assert text_of(current_model(config.output_dir)) == "one"
        if not stopped:
            break
        stops += 1
    assert stops == 5, "four files and the pointer"
    assert text_of(current_model(config.output_dir)) == "two"
    assert [text_of(uri) for uri in promoted_directories(config.output_dir)] == ["one", "two"]


def test_what_a_crash_left_makes_room_before_the_next_copy(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(config, "one")
    files.write_bytes(f"{config.run.models}/20200101T000000Z-0123456789ab/tables.safetensors", b"left")
    digest, seen = train(config, "two"), []

    def full_disk(source: str, target: str) -> None:
        seen.append(promoted_directories(config.output_dir))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "copy_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        promote_directory(config.output_dir, digest, "better", keep=config.promote.keep)
    assert seen == [[current_model(config.output_dir)]]


def test_a_crash_while_the_pointer_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(str(tmp_path))
    promote(config, "one")
    digest = train(config, "two")
    monkeypatch.setattr("os.replace", lambda source, target: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        promote_directory(config.output_dir, digest, "better", keep=config.promote.keep)
    assert text_of(current_model(config.output_dir)) == "one"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_older_ones_removed(tmp_path: Path, keep: int) -> None:
    config = config_of(str(tmp_path), keep)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "notes.txt").write_text("mine")
    names = [promote(config, text) for text in ("one", "two", "three", "four")]
    pointer = read_pointer(str(tmp_path))
    assert pointer is not None
    assert [pointer.current, *pointer.previous] == names[::-1][:keep]
    assert {text_of(uri) for uri in promoted_directories(str(tmp_path))} == set(("four", "three", "two")[:keep])
    assert (tmp_path / "models" / "notes.txt").exists()


def test_rollback_goes_back_step_by_step_and_then_says_that_there_is_no_more(config: Config) -> None:
    first, second, third = (promote(config, text) for text in ("one", "two", "three"))
    before, now = rollback(config.output_dir)
    assert (before.current, now.current, now.previous) == (third, second, (first,))
    assert third in now.why
    assert text_of(current_model(config.output_dir)) == "two"
    rollback(config.output_dir)
    assert text_of(current_model(config.output_dir)) == "one"
    with pytest.raises(ArtifactError, match=f"{first} is current, and .* has no model promoted before it"):
        rollback(config.output_dir)
    promote(config, "four")
    assert {text_of(uri) for uri in promoted_directories(config.output_dir)} == {"one", "four"}


def test_rollback_to_a_damaged_model_is_refused(config: Config) -> None:
    first = promote(config, "one")
    promote(config, "two")
    files.write_bytes(f"{config.run.models}/{first}/tables.safetensors", b"onf")
    with pytest.raises(ArtifactError, match="is damaged"):
        rollback(config.output_dir)
    assert text_of(current_model(config.output_dir)) == "two"


def test_nothing_to_roll_back_to_is_said(config: Config) -> None:
    with pytest.raises(ArtifactError, match="run cllm4rec promote first"):
        rollback(config.output_dir)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        json.dumps({"current": "../prepared", "previous": [], "promoted_at": "", "why": ""}).encode(),
        json.dumps({"current": 5, "previous": [], "promoted_at": "", "why": ""}).encode(),
        json.dumps({"current": None, "previous": None, "promoted_at": "", "why": ""}).encode(),
    ],
)
def test_a_damaged_pointer_is_refused_in_a_sentence(config: Config, content: bytes) -> None:
    train(config, "one")
    files.write_bytes(f"{config.run.models}/current.json", content)
    with pytest.raises(ArtifactError, match=r"current\.json is damaged"):
        current_model(config.output_dir)


def test_a_dangling_pointer_is_refused_and_names_what_is_missing(config: Config) -> None:
    name = promote(config, "one")
    files.remove_file(f"{config.run.models}/{name}/{MANIFEST}")
    with pytest.raises(ArtifactError, match=f"names {name}, which is not a finished model directory"):
        current_model(config.output_dir)


def test_what_an_interrupted_erasure_set_aside_goes_with_its_model(tmp_path: Path) -> None:
    config = config_of(str(tmp_path), keep=1)
    name = promote(config, "one")
    files.write_bytes(str(tmp_path / "models" / f"{name}.old" / "tables.safetensors"), b"one")
    promote(config, "two")
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == [
        registry.current_model(config.output_dir).rpartition("/")[2]
    ]
