"""The command line all commands share: exit status, one sentence, the short last line and run.json."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ray.exceptions import RayTaskError

from cllm4rec.commands import cli
from cllm4rec.errors import ArtifactError, AuditError, ConfigError, DataError, ResourceError, TrainingError

ROOT = Path(__file__).parents[2]
AMAZON = "data.interactions.format=amazon2014"
MINIMAL = {"data": {"interactions": {"path": "reviews.json"}}}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a job as a command, without Ray; returns exit status, lines of stdout and stderr."""
    monkeypatch.setattr(cli, "connect", lambda config: None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), **MINIMAL}))

    def run(job, *arguments, config=True):
        given = ["--config", str(tmp_path / "run.yaml")] if config else []
        status = cli.run_command("test", "cllm4rec test", [*given, *arguments], cli.Command(job, "A test."))
        shown = capsys.readouterr()
        return status, shown.out.splitlines(), shown.err

    return run


def without_seconds(line):
    last = json.loads(line)
    return {name: value for name, value in last.items() if name != "seconds"}


def fails(error):
    def job(config, args):
        raise error

    return job


def test_a_command_ends_with_a_short_line_and_the_whole_in_run_json(call, tmp_path):
    result = {"prepare": {"directory": "prepared", "counts": {"users": 40}}, "report": "out/report.md"}

    def job(config, args):
        print("something on the way")
        (tmp_path / "out").mkdir()
        return result

    status, lines, errors = call(job)
    assert (status, errors) == (0, "")
    last = json.loads(lines[-1])
    assert last.pop("seconds") >= 0
    assert last == {"ok": True, "output_dir": str(tmp_path / "out"), "report": "out/report.md"}
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (written["command"], written["ok"], written["result"]) == ("test", True, result)


def test_a_failed_command_leaves_its_error_in_run_json_and_makes_no_folder(call, tmp_path):
    call(fails(DataError("no rows are left")))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    call(fails(DataError("no rows are left")))
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (written["ok"], written["error"]) == (False, "no rows are left")


def test_overrides_and_flags_may_stand_anywhere(call):
    seen = []

    def job(config, args):
        seen.append((config.seed, config.pretrain.epochs, args.force))
        return {}

    call(job, "seed=3", "--force", "pretrain.epochs=2")
    call(job, "--force", "seed=3", "pretrain.epochs=2")
    assert seen == [(3, 2, True)] * 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("a is no setting"), 2),
        (DataError("no rows are left"), 1),
        (ArtifactError("model is damaged"), 1),
        (ResourceError("too few CPUs"), 1),
        (TrainingError("the loss is nan"), 1),
        (AuditError("1 users have no list"), 3),
    ],
)
def test_our_errors_are_one_sentence_and_a_status(call, error, status):
    found, lines, errors = call(fails(error))
    assert (found, errors) == (status, f"error: {error}\n")
    assert without_seconds(lines[-1]) == {"ok": False, "error": str(error)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pretrain.epoch=3"], "pretrain.epoch is not a setting"),
        (["pretrain.epochs"], "is not of the form section.key=value"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag; see cllm4rec test --help"),
    ],
)
def test_a_wrong_command_line_is_told_like_any_other_error(call, arguments, sentence):
    status, lines, errors = call(fails(AssertionError("not reached")), *arguments)
    assert status == 2
    assert errors.count("\n") == 1
    assert sentence in errors
    assert sentence in json.loads(lines[-1])["error"]


def test_a_missing_config_is_told_like_any_other_error(call):
    status, lines, errors = call(fails(AssertionError("not reached")), config=False)
    assert (status, errors.count("\n")) == (2, 1)
    assert "--config" in json.loads(lines[-1])["error"]
    status, lines, errors = call(fails(AssertionError("not reached")), "--config", "no/such/file.yaml", config=False)
    assert (status, errors.count("\n")) == (2, 1)
    assert "cannot read the config no/such/file.yaml" in errors


def test_an_unforeseen_error_shows_its_traceback_and_still_ends_in_json(call):
    status, lines, errors = call(fails(KeyError("a bug")))
    assert status == 1
    assert "Traceback (most recent call last)" in errors
    assert "in job" in errors
    assert without_seconds(lines[-1]) == {"ok": False, "error": "KeyError: 'a bug'"}


@pytest.mark.parametrize("signalled", [KeyboardInterrupt(), SystemExit(0), SystemExit(1), SystemExit(15)])
def test_an_interrupt_is_one_sentence_also_from_the_signal_handlers_of_ray(call, tmp_path, signalled):
    (tmp_path / "out").mkdir()
    status, lines, errors = call(fails(signalled))
    sentence = "interrupted; run the same command again to continue"
    assert (status, errors) == (130, f"error: {sentence}\n")
    assert without_seconds(lines[-1]) == {"ok": False, "error": sentence}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["error"] == sentence


def test_a_sigterm_is_an_interrupt_whatever_handler_ray_has_put_in_place(call):
    """Ray's own prints a C++ stack."""

    def job(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    status, _, errors = call(job)
    assert (status, errors) == (130, "error: interrupted; run the same command again to continue\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_library_that_ends_the_process_with_a_sentence_is_an_unforeseen_error(call):
    status, lines, errors = call(fails(SystemExit("no compiler found")))
    assert (status, json.loads(lines[-1])["error"]) == (1, "RuntimeError: no compiler found")
    assert "Traceback" in errors


def test_help_still_exits_with_0(call, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        call(fails(AssertionError("not reached")), "--help")
    assert "usage: cllm4rec test" in capsys.readouterr().out


@pytest.mark.parametrize("below", ["a_file/runs/x", "a_file"])
def test_an_output_dir_that_cannot_be_written_is_refused_before_ray_starts(call, tmp_path, monkeypatch, below):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setattr(cli, "connect", lambda config: pytest.fail("Ray was started"))
    status, _, errors = call(fails(AssertionError("not reached")), f"output_dir={tmp_path / below}")
    assert (status, errors.count("\n")) == (2, 1)
    assert f"cannot write to output_dir {tmp_path / below} (Not a directory: {tmp_path}/a_file); choose a" in errors


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("prepare", [], "data.interactions.path reviews.json does not exist; correct it in the config, or add"),
        ("pipeline", [], "data.interactions.path reviews.json does not exist; correct it in the config, or add"),
        ("compare", ["compare.methods=[eese]"], "compare.methods has unknown names: eese"),
        (
            "pretrain",
            [],
            "prepared is not a finished prepared directory (no manifest.json); check output_dir, or run cllm",
        ),
        (
            "serve",
            [],
            "model is not a finished model directory (no manifest.json); check output_dir, or run cllm4rec fine",
        ),
    ],
)
def test_what_is_missing_is_told_before_ray_starts(tmp_path, monkeypatch, capsys, name, overrides, sentence):
    monkeypatch.setattr(cli, "connect", lambda config: pytest.fail("Ray was started"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"output_dir": "out", **MINIMAL}))
    status = cli.run_command(name, f"cllm4rec {name}", ["--config", "run.yaml", AMAZON, *overrides])
    assert status in (1, 2)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_force_is_refused_where_it_would_mean_nothing(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), **MINIMAL}))
    assert cli.run_command("erase", "cllm4rec erase", ["--config", str(tmp_path / "run.yaml"), "--force"]) == 2
    assert "unrecognized arguments: --force; see cllm4rec erase --help" in capsys.readouterr().err


def in_a_task(cause):
    """What Ray raises in the driver for what a task raised on some node."""
    traceback = f"ray::task()\n  File x\n{type(cause).__name__}: {cause}"
    return RayTaskError("task", traceback, cause, proctitle="ray::task", pid=1, ip="127.0.0.1").as_instanceof_cause()


def test_our_error_from_a_task_is_its_sentence_only(call):
    status, lines, errors = call(fails(in_a_task(ArtifactError("model/tables.safetensors is damaged"))))
    assert (status, errors) == (1, "error: model/tables.safetensors is damaged\n")
    assert json.loads(lines[-1])["error"] == "model/tables.safetensors is damaged"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_in_a_task_is_told_as_one(call, wrapped):
    def job(config, args):
        full = in_a_task(OSError(errno.ENOSPC, "No space left on device"))
        if not wrapped:
            raise full
        raise TrainingError(f"training stopped: {full}") from full

    status, _, errors = call(job)
    assert (status, errors) == (1, "error: a disk is full; free some space and run the same command again\n")


def test_a_more_precise_sentence_about_a_full_disk_is_kept(call):
    def job(config, args):
        raise ResourceError("the disk is full while writing x; free some space") from OSError(errno.ENOSPC, "full")

    assert call(job)[2] == "error: the disk is full while writing x; free some space\n"


def test_a_program_that_cannot_read_its_config_starts_nothing(tmp_path):
    command = [sys.executable, "-m", "jobs.prepare", "--config", str(tmp_path / "missing.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: cannot read the config {tmp_path}/missing.yaml: No such file or directory; "
        "give a YAML file to --config\n"
    )
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["ok"] is False


def test_an_id_may_begin_with_a_dash(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path}/none\ndata: {{interactions: {{path: a.jsonl}}}}\n")
    config = ["--config", str(tmp_path / "run.yaml")]

    def said(name, *words):
        cli.run_command(name, f"cllm4rec {name}", [*config, *words])
        return capsys.readouterr().err

    assert "there is no run at" in said("erase", "--user", "-x7", "--user", "--y")
    assert "expected one argument" in said("erase", "--user", "--config")
    assert "expected one argument" in said("erase", "--user")
    assert "is not a table yet" in said("dump", "lookup", "--", "-x7")
    assert "comes after a --" in said("dump", "lookup", "-x7")
