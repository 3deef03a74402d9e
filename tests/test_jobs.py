"""The command line all jobs share, and what a person sees: exit status, one sentence, the last line of JSON."""

import argparse
import errno
import json
import os
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from directories import write_prepared, write_random_model
from ray.exceptions import RayTaskError

from cllm4rec import artifacts
from cllm4rec.config import parse_config
from cllm4rec.errors import ArtifactError, AuditError, ConfigError, DataError, ResourceError, TrainingError
from jobs import cli, demo, progress, resources, serve, stages
from jobs.stages import PIPELINE, Stage, run_stage

ROOT = Path(__file__).parents[1]
MINIMAL = {"output_dir": "runs/x", "data": {"interactions": {"path": "reviews.json"}}}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a job as a program but for Ray; returns exit status, lines of stdout and stderr."""
    monkeypatch.setattr(cli, "connect", lambda config: None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(MINIMAL))

    def run(job, *arguments, config=True):
        given = ["--config", str(tmp_path / "run.yaml")] if config else []
        monkeypatch.setattr(sys, "argv", ["job", *given, *arguments])
        with pytest.raises(SystemExit) as exited:
            cli.program("jobs.test", "A test.", job)
        told = capsys.readouterr()
        return exited.value.code, told.out.splitlines(), told.err

    return run


def fails(error):
    def job(config, args):
        raise error

    return job


# The command line


def test_a_job_ends_with_what_was_written_where(call):
    def job(config, args):
        print("something on the way")
        return {"prepare": {"directory": config.directory("prepared"), "seconds": 1.5}}

    status, lines, errors = call(job, "output_dir=runs/y")
    assert (status, errors) == (0, "")
    assert json.loads(lines[-1]) == {
        "ok": True, "output_dir": "runs/y", "prepare": {"directory": "runs/y/prepared", "seconds": 1.5},
    }  # fmt: skip


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
    assert json.loads(lines[-1]) == {"ok": False, "error": str(error)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pretrain.epoch=3"], "pretrain.epoch is no setting"),
        (["pretrain.epochs"], "is not of the form section.key=value"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag; python -m jobs.test --help"),
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
    assert json.loads(lines[-1]) == {"ok": False, "error": "KeyError: 'a bug'"}


def test_an_interrupt_is_no_traceback(call):
    status, lines, errors = call(fails(KeyboardInterrupt()))
    assert (status, errors.count("\n")) == (130, 1)
    assert json.loads(lines[-1])["ok"] is False


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


def test_a_local_ray_has_this_machine_and_what_reading_needs(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for num_workers, cpus in ((1, 4), (2, 4), (3, 5), (4, 6), (64, 6)):
        config = parse_config({**MINIMAL, "cluster": {"num_workers": num_workers}})
        assert cli._local_cpus(config) == cpus


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "http://127.0.0.1:{port}"])
def test_a_cluster_that_does_not_answer_is_told_at_once(monkeypatch, address):
    """Ray itself tries for some minutes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", address.format(port=probe.getsockname()[1]))
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"no Ray cluster answers at .*; correct RAY_ADDRESS or unset it"):
        cli.connect(CONFIG)
    assert time.monotonic() - started < 30


# Stages


class Recorded:
    """A stage that notes how it was asked."""

    def __init__(self, is_done):
        self.runs = []
        self.stage = Stage("finetune", "model", lambda config: is_done, self.run)

    def run(self, config, force):
        self.runs.append(force)
        return {"users": 40}


CONFIG = parse_config(MINIMAL)


def test_a_stage_that_is_done_is_skipped_with_a_line_that_says_so(capsys):
    recorded = Recorded(is_done=True)
    told = run_stage(recorded.stage, CONFIG, force=False)
    assert (told, recorded.runs) == ({"directory": "runs/x/model", "skipped": True}, [])
    assert capsys.readouterr().out == "finetune: up to date, skipped (runs/x/model); --force runs it\n"


@pytest.mark.parametrize(("is_done", "force"), [(True, True), (False, False), (False, True)])
def test_a_stage_runs_when_it_is_not_done_or_forced(is_done, force, capsys):
    recorded = Recorded(is_done)
    told = run_stage(recorded.stage, CONFIG, force)
    assert recorded.runs == [force]
    assert (told["directory"], told["skipped"], told["counts"]) == ("runs/x/model", False, {"users": 40})
    assert capsys.readouterr().out.startswith("finetune: writing runs/x/model\nfinetune: done in ")


def test_the_pipeline_has_the_stages_of_the_contract_in_order():
    assert [(stage.name, stage.directory) for stage in PIPELINE] == [
        ("prepare", "prepared"),
        ("backbone", "backbone"),
        ("pretrain", "pretrained"),
        ("finetune", "model"),
        ("evaluate", "evaluation"),
        ("score", "dump"),
    ]


def test_a_stage_whose_inputs_are_missing_says_so(tmp_path):
    config = parse_config({**MINIMAL, "output_dir": str(tmp_path)})
    for stage in PIPELINE[1:]:
        with pytest.raises(
            ArtifactError, match=r"prepared is not a finished prepared directory|is not a finished model"
        ):
            run_stage(stage, config, force=False)


def test_the_demo_writes_its_world_where_its_config_reads_it(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    monkeypatch.setattr(demo.pipeline, "run", lambda config, args: {"ran": True})
    monkeypatch.setattr(demo, "sample_world", lambda folder: artifacts.write_bytes(f"{folder}/reviews.json.gz", b"x"))
    config = parse_config(
        {"output_dir": str(tmp_path / "elsewhere"), "data": {"interactions": {"path": f"{raw}/reviews.json.gz"}}}
    )
    assert demo.run(config, argparse.Namespace()) == {"ran": True}
    assert (raw / "reviews.json.gz").exists()
    monkeypatch.setattr(demo, "sample_world", fails(AssertionError("written twice")))
    demo.run(config, argparse.Namespace())


# Too small a cluster


def cluster_of(monkeypatch, **existing):
    monkeypatch.setattr("ray.cluster_resources", lambda: existing)


def test_too_small_a_cluster_is_told_with_what_was_asked_and_what_exists(monkeypatch):
    cluster_of(monkeypatch, CPU=2.0)
    started = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        resources.wait_for({"CPU": 9, "GPU": 1}, 0.2, "score", "lower score.num_actors")
    assert str(caught.value) == (
        "score asks for 9 CPUs and 1 GPUs and the cluster has 2 CPUs and 0 GPUs; lower score.num_actors"
    )
    assert time.monotonic() - started < 5


def test_a_cluster_that_grows_is_waited_for(monkeypatch):
    sizes = iter([1.0, 1.0, 4.0])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": next(sizes)})
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    resources.wait_for({"CPU": 4}, 10.0, "score", "")


def test_scoring_asks_for_its_actors_and_one_cpu_to_read_with(monkeypatch, tmp_path):
    cluster_of(monkeypatch, CPU=6.0)
    monkeypatch.setattr(stages, "plan_score", lambda config, force: types.SimpleNamespace(config=config))
    config = parse_config(
        {**MINIMAL, "score": {"num_actors": 3}, "cluster": {"cpus_per_worker": 2, "start_timeout_s": 0.01}}
    )
    with pytest.raises(ResourceError, match="score asks for 7 CPUs and the cluster has 6 CPUs"):
        stages.SCORE.run(config, False)


# The endpoint


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A config whose model and prepared data are there, on a free port; Serve itself is never started."""
    prepared_dir = write_prepared(tmp_path / "prepared")
    write_random_model(tmp_path, prepared_dir, seed=0)
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={}))
    monkeypatch.setattr("ray.serve.start", fails(AssertionError("started")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {**MINIMAL, "output_dir": str(tmp_path), "serve": {"port": port}, "cluster": {"start_timeout_s": 0.01}}


def refused_endpoint(settings):
    with pytest.raises((ArtifactError, ResourceError)) as caught, serve.serving(parse_config(settings)):
        pass
    return str(caught.value)


def test_a_damaged_model_is_refused_before_anything_starts(served, tmp_path):
    content = bytearray((tmp_path / "model" / "tables.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model" / "tables.safetensors").write_bytes(bytes(content))
    assert "model/tables.safetensors is damaged (sha256 differs)" in refused_endpoint(served)


def test_a_missing_model_is_refused_before_anything_starts(served, tmp_path):
    artifacts.remove_directory(str(tmp_path / "model"))
    assert "model is not a finished model directory" in refused_endpoint(served)


def test_a_taken_port_is_named(served):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", served["serve"]["port"]))
        taken.listen()
        assert refused_endpoint(served) == (
            f"port {served['serve']['port']} of 127.0.0.1 cannot be used (Address already in use); "
            "set serve.port to a free one"
        )


def test_an_endpoint_that_runs_on_the_cluster_is_left_alone(served, monkeypatch):
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={"shop": "RUNNING"}))
    assert "Ray Serve already runs shop on this cluster" in refused_endpoint(served)


def test_more_replicas_than_the_cluster_holds_are_refused(served, monkeypatch):
    cluster_of(monkeypatch, CPU=2.0)
    served["serve"] |= {"min_replicas": 3, "max_replicas": 3}
    assert refused_endpoint(served) == (
        "serve asks for 3 CPUs and the cluster has 2 CPUs; lower serve.min_replicas or "
        "cluster.cpus_per_worker, or add nodes"
    )


def test_why_a_replica_did_not_start_is_its_own_sentence():
    told = (
        "Deploying application cllm4rec failed: The deployment failed to start 3 times in a row. Error:\n"
        "ray::ServeReplica:cllm4rec:Recommend.initialize_and_get_metadata()\n  File x, line 3\n"
        "cllm4rec.errors.ArtifactError: model was not trained on prepared; serve a model with its directory\n"
        "The above exception was the direct cause of the following exception:\nRuntimeError: Traceback\n"
    )
    assert serve._why(told) == "model was not trained on prepared; serve a model with its directory"
    assert serve._why("first line\nlast line\n") == "last line"


# Progress


def epoch(number, of=3, stage="pretrain", stopped=False, **more):
    entry = {"event": "epoch", "stage": stage, "epoch": number, "epochs": of, "seconds": 2.0, "loss": 1.25,
             "users_per_s": 10.0, "tokens_per_s": 1000.0, "best_epoch": 1, "stopped": stopped}  # fmt: skip
    return json.dumps(entry | more) + "\n"


STEP = json.dumps({"event": "step", "loss": 1.0}) + "\n"


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_POLL_S", 0.01)
    folder = tmp_path / "runs" / "pretrain"
    folder.mkdir(parents=True)
    return folder


def until(is_so):
    give_up = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def lines_shown(capsys):
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_epochs_are_shown_as_plain_lines_where_there_is_no_terminal(run_dir, tmp_path, capsys):
    with (run_dir / "metrics.jsonl").open("w") as file:
        file.write(epoch(1) + epoch(2))  # an earlier, interrupted run: shown then
        file.flush()
        with progress.watched(str(run_dir), str(tmp_path / "final"), forget=False):
            file.write(STEP + epoch(3, **{"validation_recall@20": 0.5}))
            file.flush()
            shown = []
            until(lambda: shown.extend(lines_shown(capsys)) or shown)
    assert shown == [
        "pretrain 3/3: loss 1.250, validation recall@20 0.5000, 1,000 tokens/s, 10 users/s, at most 0 s left"
    ]


def test_a_half_written_line_is_shown_once_when_it_is_whole(run_dir, capsys):
    follower = progress._Follower(str(run_dir / "metrics.jsonl"))
    whole = epoch(1).encode()
    (run_dir / "metrics.jsonl").write_bytes(whole[:40])
    follower._show_new(str(run_dir / "metrics.jsonl"))
    assert lines_shown(capsys) == []
    (run_dir / "metrics.jsonl").write_bytes(whole)
    for _ in range(2):
        follower._show_new(str(run_dir / "metrics.jsonl"))
    assert len(lines_shown(capsys)) == 1


def test_the_last_epochs_are_shown_where_the_stage_was_faster_than_the_follower(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_POLL_S", 60.0)
    with progress.watched(str(run_dir), str(tmp_path / "final"), forget=False):
        artifacts.remove_directory(str(run_dir))
        artifacts.write_bytes(str(tmp_path / "final" / "metrics.jsonl"), (epoch(1) + epoch(2) + epoch(3)).encode())
    assert [line[:12] for line in lines_shown(capsys)] == ["pretrain 1/3", "pretrain 2/3", "pretrain 3/3"]


def test_a_failed_run_does_not_show_an_older_runs_epochs(run_dir, tmp_path, capsys):
    artifacts.write_bytes(str(tmp_path / "final" / "metrics.jsonl"), epoch(1).encode())
    with pytest.raises(TrainingError), progress.watched(str(run_dir), str(tmp_path / "final"), forget=False):
        raise TrainingError("nan")
    assert lines_shown(capsys) == []


def test_a_resumed_run_goes_on_after_its_checkpoint_and_says_so(run_dir, capsys):
    path = run_dir / "metrics.jsonl"
    path.write_text(epoch(1) + epoch(2))
    follower = progress._Follower(str(path))
    path.write_text(epoch(1) + json.dumps({"event": "resumed"}) + "\n")  # cut back to the checkpoint of epoch 1
    follower._show_new(str(path))
    path.write_text(epoch(1) + json.dumps({"event": "resumed"}) + "\n" + epoch(2) + epoch(3, stopped=True))
    follower._show_new(str(path))
    shown = lines_shown(capsys)
    assert shown[0] == "going on from the last checkpoint of an interrupted run"
    assert [line[:12] for line in shown[1:3]] == ["pretrain 2/3", "pretrain 3/3"]
    assert shown[3:] == ["pretrain: stopped, no better validation since epoch 1"]


def test_a_file_that_goes_away_and_comes_back_shows_nothing_twice(run_dir, capsys):
    path = run_dir / "metrics.jsonl"
    path.write_text(epoch(1))
    follower = progress._Follower(str(path))
    path.unlink()
    follower._show_new(str(path))
    path.write_text(epoch(1) + epoch(2))
    follower._show_new(str(path))
    assert [line[:12] for line in lines_shown(capsys)] == ["pretrain 2/3"]


def test_a_run_is_forgotten_where_it_is_forced(run_dir, tmp_path):
    (run_dir / "metrics.jsonl").write_text(epoch(1))
    with progress.watched(str(run_dir), str(tmp_path / "final"), forget=True):
        assert not run_dir.exists()


def test_on_a_terminal_a_line_does_not_tear_the_bar(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    path = run_dir / "metrics.jsonl"
    follower = progress._Follower(str(path))
    path.write_text(epoch(1))
    follower._show_new(str(path))
    progress.say("a line of the stage")
    path.write_text(epoch(1) + json.dumps({"event": "warning", "message": "checkpoint 2 is damaged"}) + "\n")
    follower._show_new(str(path))
    follower.stop()
    told = capsys.readouterr()
    assert told.out == "a line of the stage\n  warning: checkpoint 2 is damaged\n"
    assert "pretrain:" in told.err  # the bar


def test_users_are_counted_as_plain_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_COUNT_S", 0.02)
    numbers = iter([100, 150, 150, *[2000] * 10_000])
    shown = []
    with progress.counted(lambda: next(numbers), 2000, "users"):
        until(lambda: shown.extend(lines_shown(capsys)) or len(shown) >= 3)
    assert shown[0].startswith("150 of 2,000 users, ")
    assert shown[0].endswith(" s left")
    assert shown[2].startswith("2,000 of 2,000 users, ")
    assert shown[2].endswith(" users/s, 0 s left")
