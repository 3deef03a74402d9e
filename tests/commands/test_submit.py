"""The same command under `ray job submit`: a real cluster, a real submission of this folder, the whole chain."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deltalake import DeltaTable
from ray.job_submission import JobStatus, JobSubmissionClient
from support.ports import free_port, free_ports
from support.runs import write_config

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def descendants(pid: int) -> list[int]:
    """A process, its children, theirs and so on: the cluster's and nobody else's."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])  # the name before it may hold anything
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Address of the dashboard of a cluster of one node with ports of its own, and its folder."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port", "ray-client-server-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    # A socket's path may have 107 characters: not below pytest's folder.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        options = [f"--{name}={port}" for name, port in ports.items()]
        options += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--num-cpus=4", f"--temp-dir={folder}"]
        # Not `ray stop` in the end: it would stop every Ray of the machine.
        head = subprocess.Popen(
            [*RAY, "start", "--head", "--block", "--disable-usage-stats", *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder,
        )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{ports['dashboard-port']}", folder
        finally:
            for pid in descendants(head.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            head.wait()


def connected(address: str) -> JobSubmissionClient:
    give_up = time.monotonic() + 60
    while True:
        try:
            return JobSubmissionClient(address)
        except ConnectionError:
            assert time.monotonic() < give_up, "the cluster does not start"
            time.sleep(0.5)


def test_the_pipeline_runs_as_a_submitted_job(cluster: tuple[str, str], tmp_path: Path) -> None:
    address, folder = cluster
    client = connected(address)
    submit = ["job", "submit", "--address", address, "--no-wait", "--submission-id", "chain", "--working-dir", "."]
    config = str(write_config(tmp_path, serve={"port": free_port()}))
    command = ["--", "python", "-m", "jobs.pipeline", "--config", config, "pretrain.epochs=1"]
    subprocess.run([*RAY, *submit, *command], cwd=ROOT, check=True, capture_output=True, timeout=120)
    give_up = time.monotonic() + 400
    while not (status := client.get_job_status("chain")).is_terminal():
        assert time.monotonic() < give_up, client.get_job_logs("chain")[-4000:]
        time.sleep(1)
    logs = client.get_job_logs("chain")
    assert status == JobStatus.SUCCEEDED, logs[-4000:]

    told = json.loads(logs.splitlines()[-1])
    stages = ["prepare", "backbone", "pretrain", "finetune", "evaluate", "score"]
    assert (told["ok"], told["output_dir"]) == (True, str(tmp_path / "out"))
    told = json.loads((tmp_path / "out" / "run.json").read_text())["result"]
    assert [told[stage]["skipped"] for stage in stages] == [False] * 6
    assert told["score"]["counts"]["users"] == 40
    assert told["serve"]["items"] == 5
    assert not re.search(r"user-\d", (tmp_path / "out" / "run.json").read_text()), "an erasure would have to find it"
    assert DeltaTable(str(tmp_path / "out" / "dump")).to_pandas()["user_id"].nunique() == 40
    # The job ran from the uploaded directory, which holds code alone.
    packages = Path(folder).glob("session_latest/runtime_resources/working_dir_files/*")
    (uploaded,) = [package for package in packages if package.is_dir()]
    names = {path.name for path in uploaded.iterdir()}
    assert {"cllm4rec", "jobs"} <= names
    assert (uploaded / "jobs" / "configs" / "demo.yaml").is_file()
    assert not names & {"runs", ".venv", ".git", ".hypothesis", "docs", "tests"}
