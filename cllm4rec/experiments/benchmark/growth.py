"""How time and memory grow: with users through the jobs themselves, with items through a training step and the Scorer.

Jobs run as programs of their own, and every process below is watched: the peak is that of the largest one, of memory that
is its own (Ray's object store is shared).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml
from matplotlib.figure import Figure

from cllm4rec import allocator
from cllm4rec.data.world import sample_world
from cllm4rec.errors import ResourceError
from cllm4rec.experiments.benchmark.directories import fresh
from cllm4rec.experiments.benchmark.figures import Row
from cllm4rec.reporting import plain, png

STAGES = ("prepare", "backbone", "pretrain", "finetune", "score")
_PARTS = ("prepare", "epoch", "score")
_WATCH_S = 0.2
_NUM_ITEMS = 5_000
"""The same at every number of users: the catalog grows in a part of its own."""
_WIDTH = 64


def growth(output_dir: str, users: list[int], items: list[int], say: Callable[[str], None]) -> Row:
    """A row for each number of users and each catalog, and `growth.png`."""
    told: Row = {"users": [], "items": []}
    for num_users in users:
        row = _of_users(output_dir, num_users)
        told["users"].append(row | (further(told["users"][-1], row) if told["users"] else {}))
        say(f"growth: {num_users:,} users, {json.dumps(told['users'][-1])}")
    for num_items in items:
        told["items"].append(_of_items(num_items))
        say(f"growth: {num_items:,} items, {json.dumps(told['items'][-1])}")
    _plot(told, os.path.join(output_dir, "growth.png"))
    return told


def _of_users(output_dir: str, num_users: int) -> Row:
    folder = fresh(os.path.join(output_dir, f"growth-{num_users}"))
    sample_world(folder, num_users, _NUM_ITEMS)
    file = Path(folder) / "config.yaml"
    file.write_text(yaml.safe_dump(_config(folder)))
    # What finetuning has to hold: content and collaborative tables, and Adam's two moments of the latter.
    told: Row = {"users": num_users, "tables_mb": 4 * (num_users + _NUM_ITEMS) * _WIDTH * 4 / 1e6}
    for stage in STAGES:
        seconds, peak_mb, last = run_watched([sys.executable, "-m", "cllm4rec", stage, "--config", str(file)])
        told |= {f"{stage}_s": seconds, f"{stage}_peak_mb": peak_mb}
        if stage == "finetune":
            told["epoch_s"] = _epoch_s(Path(folder) / "model" / "metrics.jsonl")
        if stage == "prepare":
            told["kept_users"] = last["prepare"]["counts"]["users"]
    for name in _PARTS:
        told[f"{name}_ms_per_user"] = 1000 * told[f"{name}_s"] / num_users
    fresh(folder)
    return told


def further(smaller: Row, larger: Row) -> Row:
    """What a user more costs from one size to the next: without what every job takes to start."""
    users = larger["users"] - smaller["users"]
    return {
        f"{name}_ms_per_further_user": 1000 * (larger[f"{name}_s"] - smaller[f"{name}_s"]) / users for name in _PARTS
    }


def _config(folder: str) -> dict[str, Any]:
    """One epoch of finetuning around a small backbone; pretraining and the backbone itself stay as they are made."""
    texts = {"user": "reviewerID", "text": "biography"}
    return {
        "output_dir": folder,
        "data": {
            "interactions": {"path": f"{folder}/reviews.json.gz", "format": "amazon2014"},
            "users": {"path": f"{folder}/users.jsonl.gz", "format": "jsonl", "columns": texts},
            "max_text_tokens": 48,
        },
        "model": {
            "backbone": {"layers": 2, "width": _WIDTH, "heads": 4, "vocab_size": 1024},
            "max_tokens": 64,
        },
        "pretrain": {"warmup_epochs": 0, "epochs": 0},
        "finetune": {"epochs": 1},
        "training": {"bf16": False, "micro_batch_tokens": 8192},
        "score": {"batch_users": 4096},
    }


def _epoch_s(metrics: Path) -> float:
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    return float(next(entry["seconds"] for entry in entries if entry["event"] == "epoch"))


def _of_items(num_items: int) -> Row:
    command = [sys.executable, "-m", "cllm4rec.experiments.benchmark.catalog", str(num_items)]
    _, peak_mb, told = run_watched(command, {**os.environ, **allocator.environment()})  # as a worker runs
    return {"items": num_items, **told, "peak_mb": peak_mb}


def run_watched(command: list[str], variables: Mapping[str, str] | None = None) -> tuple[float, float, dict[str, Any]]:
    """Seconds, the largest process's peak of own memory in MB, and the last line of output as JSON.

    variables: its environment, by default this one without the workers' allocator, which jobs hand on by themselves.
    Raises ResourceError where the program fails.
    """
    began = time.monotonic()
    variables = allocator.without(os.environ) if variables is None else variables
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables) as process:
        watch = _Watch(process.pid)
        watch.start()
        output, errors = process.communicate()
        watch.stop()
    if process.returncode:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        raise ResourceError(f"{' '.join(command[2:4])} failed while growth was measured: {last}")
    return time.monotonic() - began, watch.peak_bytes / 1e6, json.loads(output.strip().splitlines()[-1])


class _Watch(threading.Thread):
    """The peak of private memory over a process and all below it, each by itself."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._pid, self._done = pid, threading.Event()

    def run(self) -> None:
        while not self._done.wait(_WATCH_S):
            self.peak_bytes = max([self.peak_bytes, *_private_bytes(self._pid)])

    def stop(self) -> None:
        self._done.set()
        self.join()


def _private_bytes(pid: int) -> list[int]:
    found = []
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            memory = process.memory_info()
            found.append(int(memory.rss - getattr(memory, "shared", 0)))
    except psutil.Error:  # gone meanwhile
        pass
    return found


def _plot(told: Row, path: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    users = [one["users"] for one in told["users"]]
    for name in _PARTS:
        time_axes.plot(users, [one[f"{name}_s"] for one in told["users"]], marker="o", label=name)
    for name in ("prepare", "finetune", "score"):
        memory_axes.plot(users, [one[f"{name}_peak_mb"] / 1000 for one in told["users"]], marker="o", label=name)
    tables = [one["tables_mb"] / 1000 for one in told["users"]]
    memory_axes.plot(users, tables, linestyle="--", color="grey", label="ID tables and Adam's moments")
    items = [one["items"] for one in told["items"]]
    memory_axes.plot(
        items, [one["peak_mb"] / 1000 for one in told["items"]], marker="s", label="a step and lists, by items"
    )
    time_axes.set(xscale="log", yscale="log", xlabel="users", ylabel="seconds, start-up included")
    memory_axes.set(xscale="log", xlabel="users or items", ylabel="GB, largest process", ylim=(0, None))
    for axes in (time_axes, memory_axes):
        plain(axes, "y")
        axes.legend(frameon=False)
    Path(path).write_bytes(png(figure))
