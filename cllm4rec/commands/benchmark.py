"""Measure the speed of this machine, and how much of it training and scoring use → `report.md` and JSON.

    cllm4rec benchmark --only machine,training,scoring --json benchmark.json
    cllm4rec benchmark --users 10000,100000,1000000 --items 10000,100000,1000000

The parts are: the machine's matrix-product rate; training steps and scoring, compared with a reference implementation; the
overhead of Ray; growth with users and items; and start-up times. The model of the configuration `benchmark` has the shape of
GPT-2 small with random weights, because speed does not depend on them. The first command takes less than 10 minutes on 2 idle
cores. Lengths are those of real data sets if CLLM4REC_SHARED (default ../shared) holds them, else those of the sample world,
and the report says so. Each figure is the median of several samples; the JSON has the spread, too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cllm4rec.cluster import connect
from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.errors import ConfigError
from cllm4rec.storage import files

PARTS = ("machine", "training", "scoring", "ray_overhead", "growth", "startup")
_SHARED = "CLLM4REC_SHARED"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="PART,...", help=f"measure only these parts, of {', '.join(PARTS)}")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads; default: one per core")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device of the machine, training and scoring parts"
    )
    parser.add_argument("--output", metavar="DIR", help="folder of report.md and the plot; default: output_dir")
    parser.add_argument("--users", default="10000,100000", metavar="N,...", help="numbers of users of the growth part")
    parser.add_argument("--items", default="10000,100000", metavar="N,...", help="catalog sizes of the growth part")
    parser.add_argument(
        "--ray-overhead-users", type=int, default=20_000, metavar="N", help="users of the ray_overhead part"
    )


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    from cllm4rec.experiments.benchmark.report import report

    if args.device == "cuda":
        _refuse_without_gpu()
    if args.output:
        config = config.model_copy(update={"output_dir": args.output})
    parts = _parts(args.only)
    os.makedirs(config.output_dir, exist_ok=True)
    result = _measure(config, parts, args)
    text = report(result)
    files.write_bytes(files.join(config.output_dir, "report.md"), text.encode())
    written = {"report": files.join(config.output_dir, "report.md"), "json": args.json}
    if args.json:
        files.write_json(args.json, result)
    say(f"\n{text}")
    return {"output_dir": config.output_dir, "parts": parts, **{name: path for name, path in written.items() if path}}


def _parts(only: str | None) -> list[str]:
    chosen = only.split(",") if only else list(PARTS)
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise ConfigError(f"--only has unknown parts: {', '.join(unknown)}; use parts of {', '.join(PARTS)}")
    return [part for part in PARTS if part in chosen]


def _measure(config: Config, parts: list[str], args: argparse.Namespace) -> dict[str, Any]:
    import torch

    threads = args.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    result: dict[str, Any] = {"notes": []}
    if {"machine", "training", "scoring"} & set(parts):
        result = _measure_model(config, parts, args.device)
    others: dict[str, Callable[[], dict[str, Any]]] = {
        "ray_overhead": lambda: _ray_overhead(config, threads, args.ray_overhead_users),
        "growth": lambda: _growth(config, _sizes(args.users, "--users"), _sizes(args.items, "--items")),
        "startup": lambda: _startup(config),
    }
    for part in parts:
        if part in others:
            say(f"benchmark: {part}")
            result[part] = others[part]()
    return result


def _measure_model(config: Config, parts: list[str], device: str) -> dict[str, Any]:
    """The machine, training and scoring parts, in this process and without Ray."""
    from cllm4rec.experiments.benchmark.corpora import load_corpora
    from cllm4rec.experiments.benchmark.machine import machine, rate_sampler
    from cllm4rec.experiments.benchmark.scoring import scoring
    from cllm4rec.experiments.benchmark.training import Setting, training
    from cllm4rec.model.backbone_files import new_backbone
    from cllm4rec.model.precision import precision_on

    say("benchmark: machine")
    result: dict[str, Any] = {"machine": machine(device=device), "notes": []}
    if not {"training", "scoring"} & set(parts):
        return result
    corpora = load_corpora(Path(os.environ.get(_SHARED) or "../shared"))
    result["notes"] += corpora.notes
    backbone = new_backbone(config.model, corpora.histories.token_space.num_words, config.seed)
    micro_batch_tokens, max_tokens = (
        config.training.micro_batch_tokens or Setting.micro_batch_tokens,
        config.model.max_tokens,
    )
    precision = precision_on(device, config.training.bf16)
    setting = Setting(micro_batch_tokens, max_tokens, config.score.batch_users, device=device, precision=precision)
    rate = rate_sampler(precision, device)
    result["precision"] = str(precision).removeprefix("torch.")
    result["notes"].append(
        f"Training and scoring use {result['precision']}; utilization is relative to the machine's rate in that precision."
    )
    if "training" in parts:
        result["training"] = training(corpora, backbone, setting, rate, say)
    if "scoring" in parts:
        result["scoring"] = scoring(corpora, backbone, setting, rate, say)
    return result


def _refuse_without_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that torch can use; omit it to measure the CPU")


def _sizes(text: str, flag: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word]
    except ValueError:
        raise ConfigError(f"{flag} {text} should be whole numbers separated by commas") from None


def _ray_overhead(config: Config, threads: int, num_users: int) -> dict[str, Any]:
    import ray

    from cllm4rec.experiments.benchmark.ray_overhead import ray_overhead

    try:
        return ray_overhead(config, threads, num_users, connect, ray.shutdown)
    finally:
        ray.shutdown()  # later parts start Ray in processes of their own


def _growth(config: Config, users: list[int], items: list[int]) -> dict[str, Any]:
    from cllm4rec.experiments.benchmark.growth import growth

    return growth(config.output_dir, users, items, say)


def _startup(config: Config) -> dict[str, Any]:
    from cllm4rec.experiments.benchmark.startup import startup

    return startup(config)


COMMAND = Command(run, __doc__ or "", add_flags=add_flags, default_config="benchmark", needs_ray=False, has_force=False)
