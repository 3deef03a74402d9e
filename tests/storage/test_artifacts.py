"""Directories between stages: whole or not there, and refused when they are not what they say."""

import errno
import json
import uuid

import fsspec
import pytest

from cllm4rec.errors import ArtifactError, ResourceError
from cllm4rec.storage import artifacts, files
from cllm4rec.storage.artifacts import MANIFEST, is_current, read_manifest, verify_files, write_directory


@pytest.fixture(params=["local", "memory"])
def uri(request, tmp_path):
    return str(tmp_path / "runs" / "model") if request.param == "local" else f"memory://{uuid.uuid4().hex}/model"


def spoil(uri, error):
    """A block that fails half way."""
    with write_directory(uri, kind="model", inputs={}, config={}) as draft:
        files.write_bytes(draft.path("deep", "text.txt"), b"half")
        raise error


def write(uri, text="one", kind="model", **inputs):
    with write_directory(uri, kind=kind, inputs=inputs, config={"seed": 0}) as draft:
        files.write_bytes(draft.path("deep", "text.txt"), text.encode())
        draft.counts["letters"] = len(text)


def text_of(uri):
    return files.read_bytes(files.join(uri, "deep/text.txt")).decode()


def edit_manifest(uri, **changes):
    path = files.join(uri, MANIFEST)
    files.write_json(path, files.read_json(path) | changes)


def test_a_directory_tells_what_is_in_it(uri):
    write(uri, "three", prepared="abc")
    manifest = read_manifest(uri, "model")
    assert (manifest.counts, manifest.inputs, manifest.config) == ({"letters": 5}, {"prepared": "abc"}, {"seed": 0})
    assert manifest.files == {
        "deep/text.txt": {"sha256": "8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f", "bytes": 5}
    }
    assert files.list_files(uri) == ["deep/text.txt", MANIFEST]
    verify_files(uri, manifest)


def test_a_new_directory_replaces_the_old_one_whole(uri):
    with write_directory(uri, kind="model", inputs={}, config={}) as draft:
        files.write_bytes(draft.path("only-in-the-first.txt"), b"")
    write(uri, "two")
    assert text_of(uri) == "two"
    assert files.list_files(uri) == ["deep/text.txt", MANIFEST]
    assert not files.exists(f"{uri}.old")
    assert not files.exists(f"{uri}.partial")


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_a_failing_block_leaves_the_old_directory_and_no_draft(uri, error):
    write(uri)
    with pytest.raises(type(error)):
        spoil(uri, error)
    assert text_of(uri) == "one"
    assert not files.exists(f"{uri}.partial")
    verify_files(uri, read_manifest(uri, "model"))


def test_a_failing_first_block_leaves_nothing(uri):
    with pytest.raises(ValueError, match="a bug"):
        spoil(uri, ValueError("a bug"))
    assert not files.exists(uri)
    with pytest.raises(
        ArtifactError, match=r"is not a finished model directory .*; check output_dir, or run cllm4rec finetune"
    ):
        read_manifest(uri, "model")


def test_the_manifest_is_written_when_everything_else_is_there(uri, monkeypatch):
    seen = []
    real = files.write_json
    monkeypatch.setattr(artifacts, "write_json", lambda to, value: (seen.append((to, value)), real(to, value)))
    write(uri)
    ((where, manifest),) = seen
    assert where.endswith(f"model.partial/{MANIFEST}")
    assert list(manifest["files"]) == ["deep/text.txt"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors puts it
    ],
)
def test_a_full_disk_is_told_in_a_sentence_and_leaves_the_old_directory(uri, error):
    write(uri)
    with pytest.raises(ResourceError, match=r"disk is full while writing .*model; free some space"):
        spoil(uri, error)
    assert text_of(uri) == "one"
    assert not files.exists(f"{uri}.partial")


def test_another_io_error_stays_what_it_is(uri):
    with pytest.raises(PermissionError):
        spoil(uri, PermissionError(errno.EACCES, "Permission denied"))


# A crash between the renames


class Crash(BaseException):
    """A process that ends: nothing after it runs."""


def crash_before(monkeypatch, step):
    """Replace the move by one that dies at its first or second call, as a killed process does: without cleaning up."""
    calls = []
    move, remove = artifacts.move_directory, files.remove_directory

    def dying_move(source, target):
        calls.append(source)
        if len(calls) == step:
            raise Crash
        move(source, target)

    monkeypatch.setattr(artifacts, "move_directory", dying_move)
    monkeypatch.setattr(artifacts, "remove_directory", lambda uri: None if len(calls) == step else remove(uri))


@pytest.mark.parametrize("step", [1, 2])
def test_a_crash_between_the_two_moves_does_not_lose_the_old_directory(uri, step):
    write(uri, "old", prepared="abc")
    with pytest.MonkeyPatch.context() as patch:
        crash_before(patch, step)
        with pytest.raises(Crash):
            write(uri, "new")
    assert files.exists(uri) == (step == 1)
    assert is_current(uri, "model", {"prepared": "abc"})
    assert text_of(uri) == "old"
    verify_files(uri, read_manifest(uri, "model"))


def test_after_such_a_crash_a_failing_run_still_leaves_the_old_directory(uri):
    write(uri, "old")
    with pytest.MonkeyPatch.context() as patch:
        crash_before(patch, 2)
        with pytest.raises(Crash):
            write(uri, "new")
    with pytest.raises(ValueError, match="a bug"):
        spoil(uri, ValueError("a bug"))
    assert text_of(uri) == "old"
    write(uri, "newest")
    assert text_of(uri) == "newest"
    assert not files.exists(f"{uri}.old")


def test_elsewhere_than_on_a_local_disk_the_manifest_is_moved_last(monkeypatch):
    uri = f"memory://{uuid.uuid4().hex}/model"
    order = []
    fs = fsspec.filesystem("memory")
    real = fs.cp_file
    monkeypatch.setattr(type(fs), "cp_file", lambda self, one, other, **_: (order.append(other), real(one, other))[1])
    with write_directory(uri, kind="model", inputs={}, config={}) as draft:
        for name in ("a.txt", "z.txt"):
            files.write_bytes(draft.path(name), b"x")
    assert [path.rsplit("/", 1)[-1] for path in order] == ["a.txt", "z.txt", MANIFEST]


# What is refused


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"kind": "model"}', b"null"])
def test_a_damaged_manifest_is_refused_in_a_sentence(uri, content):
    write(uri)
    files.write_bytes(files.join(uri, MANIFEST), content)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged.*--force"):
        read_manifest(uri, "model")
    assert not is_current(uri, "model", {})


def test_a_directory_of_another_kind_is_refused_and_never_replaced(uri):
    write(uri, kind="prepared")
    with pytest.raises(ArtifactError, match="is a prepared directory, but a model directory is needed"):
        read_manifest(uri, "model")
    with pytest.raises(ArtifactError, match="no model stage wrote"):
        write(uri, "new", kind="model")
    assert text_of(uri) == "one"


def test_somebody_elses_folder_of_that_name_is_not_replaced(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write(str(folder))  # an empty one is nobody's
    other = tmp_path / "evaluation"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="move them away or set another output_dir"):
        write(str(other), kind="evaluation")
    assert (other / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "evaluation.partial").exists()


def test_another_schema_version_is_refused_whatever_its_fields_are(uri):
    write(uri)
    edit_manifest(uri, schema_version=99, a_field_of_the_future=1)
    with pytest.raises(ArtifactError, match="schema version 99 and this code reads 1; run the stage"):
        read_manifest(uri, "model")
    assert not is_current(uri, "model", {})
    write(uri, "anew")
    assert text_of(uri) == "anew"


def test_a_flipped_bit_and_a_missing_file_are_found(uri):
    write(uri)
    manifest = read_manifest(uri, "model")
    files.write_bytes(files.join(uri, "deep/text.txt"), b"onf")
    with pytest.raises(ArtifactError, match=r"deep/text\.txt is damaged"):
        verify_files(uri, manifest)
    files.remove_file(files.join(uri, "deep/text.txt"))
    with pytest.raises(ArtifactError, match=r"deep/text\.txt is missing"):
        verify_files(uri, manifest)


def test_a_directory_is_current_for_the_inputs_it_was_made_from_only(uri):
    assert not is_current(uri, "model", {"prepared": "abc"})
    write(uri, prepared="abc")
    assert is_current(uri, "model", {"prepared": "abc"})
    assert not is_current(uri, "model", {"prepared": "abd"})
    assert not is_current(uri, "model", {})


def test_a_digest_depends_on_the_files_and_not_on_logs_or_the_clock(uri):
    write(uri)
    first = read_manifest(uri, "model")
    with write_directory(uri, kind="model", inputs={"other": "input"}, config={}) as draft:
        files.write_bytes(draft.path("deep", "text.txt"), b"one")
        files.write_bytes(draft.path("metrics.jsonl"), b'{"seconds": 1.5}\n')
    second = read_manifest(uri, "model")
    assert second.digest == first.digest
    assert "metrics.jsonl" in second.files  # checked for damage all the same
    write(uri, "other")
    assert read_manifest(uri, "model").digest != first.digest


# Small files


def test_lines_are_appended_on_every_file_system(uri):
    for line in (b"one\n", b"two\n"):
        files.append_bytes(files.join(uri, "log"), line)
    assert files.read_bytes(files.join(uri, "log")) == b"one\ntwo\n"


def test_a_missing_file_and_broken_json_are_told_in_a_sentence(uri):
    with pytest.raises(ArtifactError, match="is missing; run the stage"):
        files.read_bytes(files.join(uri, "nothing"))
    files.write_bytes(files.join(uri, "half.json"), json.dumps({"a": 1}).encode()[:-1])
    with pytest.raises(ArtifactError, match=r"half\.json is damaged"):
        files.read_json(files.join(uri, "half.json"))


def test_a_uri_means_the_same_in_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.absolute("runs/model") == str(tmp_path / "runs" / "model")
    assert files.absolute("memory://runs/model") == "memory:///runs/model"


def test_a_digest_of_a_value_ignores_the_order_of_keys():
    assert files.digest_of({"a": 1, "b": [2]}) == files.digest_of({"b": [2], "a": 1})
    assert files.digest_of({"a": 1}) != files.digest_of({"a": 2})
