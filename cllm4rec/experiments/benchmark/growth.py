"""Growth of time and memory: with users for whole commands, with items for a training step and the Scorer.

Each command runs in a process of its own, and all its child processes are observed. The reported peak is the largest private
memory of a single process; shared memory, such as Ray's object store, is not counted.
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
from cllm4rec.experiments.benchmark.directories import empty_directory
from cllm4rec.experiments.benchmark.figures import Figures
from cllm4rec.reporting import plain, png
from cllm4rec.storage.artifacts import read_manifest

STAGES = ("prepare", "backbone", "pretrain", "finetune", "score")
_PARTS = ("prepare", "epoch", "score")
_SAMPLE_INTERVAL_S = 0.2
_NUM_ITEMS = 5_000
"""Fixed while the number of users grows; catalogs are measured separately."""
_WIDTH = 64


def growth(output_dir: str, users: list[int], items: list[int], say: Callable[[str], None]) -> Figures:
    """Figures for each number of users and each catalog size; writes `growth.png`."""
    result: Figures = {"users": [], "items": []}
    for num_users in users:
        figures = _measure_users(output_dir, num_users)
        added = cost_of_additional_users(result["users"][-1], figures) if result["users"] else {}
        result["users"].append(figures | added)
        say(f"growth: {num_users:,} users, {json.dumps(result['users'][-1])}")
    for num_items in items:
        result["items"].append(_measure_items(num_items))
        say(f"growth: {num_items:,} items, {json.dumps(result['items'][-1])}")
    _plot(result, os.path.join(output_dir, "growth.png"))
    return result


def _measure_users(output_dir: str, num_users: int) -> Figures:
    folder = empty_directory(os.path.join(output_dir, f"growth-{num_users}"))
    sample_world(folder, num_users, _NUM_ITEMS)
    file = Path(folder) / "config.yaml"
    file.write_text(yaml.safe_dump(_config(folder)))
    # Finetuning holds the content and collaborative tables, and Adam's two moments of the latter.
    figures: Figures = {"users": num_users, "tables_mb": 4 * (num_users + _NUM_ITEMS) * _WIDTH * 4 / 1e6}
    for stage in STAGES:
        seconds, peak_mb, _ = run_observed([sys.executable, "-m", "cllm4rec", stage, "--config", str(file)])
        figures |= {f"{stage}_s": seconds, f"{stage}_peak_mb": peak_mb}
        if stage == "finetune":
            figures["epoch_s"] = _epoch_s(Path(folder) / "model" / "metrics.jsonl")
    figures["kept_users"] = read_manifest(os.path.join(folder, "prepared"), "prepared").counts["users"]
    for name in _PARTS:
        figures[f"{name}_ms_per_user"] = 1000 * figures[f"{name}_s"] / num_users
    empty_directory(folder)
    return figures


def cost_of_additional_users(smaller: Figures, larger: Figures) -> Figures:
    """Milliseconds per additional user between two sizes, which excludes the start-up time of the commands."""
    users = larger["users"] - smaller["users"]
    return {
        f"{name}_ms_per_additional_user": 1000 * (larger[f"{name}_s"] - smaller[f"{name}_s"]) / users for name in _PARTS
    }


def _config(folder: str) -> dict[str, Any]:
    """One epoch of finetuning with a small backbone; the backbone and the pretrained tables stay untrained."""
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


def _measure_items(num_items: int) -> Figures:
    command = [sys.executable, "-m", "cllm4rec.experiments.benchmark.catalog", str(num_items)]
    _, peak_mb, figures = run_observed(command, {**os.environ, **allocator.environment()})  # as in a worker
    return {"items": num_items, **figures, "peak_mb": peak_mb}


def run_observed(command: list[str], variables: Mapping[str, str] | None = None) -> tuple[float, float, dict[str, Any]]:
    """Run a program: seconds, peak private memory of its largest process in MB, and its last line of output, parsed as JSON.

    variables: its environment; by default that of this process without the workers' allocator, which commands set themselves.
    Raises ResourceError if the program fails.
    """
    began = time.monotonic()
    variables = allocator.without(os.environ) if variables is None else variables
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables) as process:
        watch = _Watch(process.pid)
        watch.start()
        output, errors = process.communicate()
        watch.stop()
    if process.returncode:
        last = (errors.strip().splitlines() or ["it printed nothing"])[-1]
        raise ResourceError(f"{' '.join(command[2:4])} failed during the growth measurement: {last}")
    return time.monotonic() - began, watch.peak_bytes / 1e6, json.loads(output.strip().splitlines()[-1])


class _Watch(threading.Thread):
    """Samples the private memory of a process and its children; the peak is that of the largest single process."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._pid, self._done = pid, threading.Event()

    def run(self) -> None:
        while not self._done.wait(_SAMPLE_INTERVAL_S):
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
    except psutil.Error:  # the process has ended
        pass
    return found


def _plot(result: Figures, path: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    by_users, by_items = result["users"], result["items"]
    users, items = _column(by_users, "users"), _column(by_items, "items")
    for name in _PARTS:
        time_axes.plot(users, _column(by_users, f"{name}_s"), marker="o", label=name)
    for name in ("prepare", "finetune", "score"):
        memory_axes.plot(users, _column(by_users, f"{name}_peak_mb", 1000), marker="o", label=name)
    tables = _column(by_users, "tables_mb", 1000)
    memory_axes.plot(users, tables, linestyle="--", color="grey", label="ID tables and Adam's moments")
    peaks = _column(by_items, "peak_mb", 1000)
    memory_axes.plot(items, peaks, marker="s", label="training step and scoring, by items")
    time_axes.set(xscale="log", yscale="log", xlabel="users", ylabel="seconds, including start-up")
    memory_axes.set(xscale="log", xlabel="users or items", ylabel="memory of the largest process, GB", ylim=(0, None))
    for axes in (time_axes, memory_axes):
        plain(axes, "y")
        axes.legend(frameon=False)
    Path(path).write_bytes(png(figure))


def _column(rows: list[Figures], name: str, unit: float = 1.0) -> list[float]:
    return [row[name] / unit for row in rows]
