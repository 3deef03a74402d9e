"""How fast this machine is, and how much of that training and scoring use → `report.md` and JSON.

    cllm4rec benchmark --only machine,training,scoring --json benchmark.json
    cllm4rec benchmark --users 10000,100000,1000000 --items 10000,100000,1000000

Measures the machine's matrix rate, training steps and scoring beside a plain reference, what is lost to Ray, growth with
users and items, and start-up. The model is that of the shipped config `benchmark`, GPT-2 small's shape with random
weights: speed does not depend on them. The first command takes under 10 minutes on 2 quiet cores. Lengths are those of
the real data in CLLM4REC_SHARED (unset or empty: ../shared), or those of the sample world if it is missing; the report
says which. Every figure is a median of several; the JSON has its spread.
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
    parser.add_argument("--only", metavar="PART,...", help=f"these parts alone, of {', '.join(PARTS)}")
    parser.add_argument("--json", metavar="FILE", help="write all figures here too")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads; by default a thread a core")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of machine, training and scoring")
    parser.add_argument("--output", metavar="DIR", help="where report.md and the plot go, instead of output_dir")
    parser.add_argument("--users", default="10000,100000", metavar="N,...", help="sizes of the growth part")
    parser.add_argument("--items", default="10000,100000", metavar="N,...", help="catalogs of the growth part")
    parser.add_argument(
        "--ray-overhead-users", type=int, default=20_000, metavar="N", help="users of the ray_overhead part's epoch"
    )


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    from cllm4rec.experiments.benchmark.report import report

    if args.device == "cuda":
        _refuse_without_gpu()
    if args.output:
        config = config.model_copy(update={"output_dir": args.output})
    parts = _parts(args.only)
    os.makedirs(config.output_dir, exist_ok=True)
    told = _measure(config, parts, args)
    text = report(told)
    files.write_bytes(files.join(config.output_dir, "report.md"), text.encode())
    written = {"report": files.join(config.output_dir, "report.md"), "json": args.json}
    if args.json:
        files.write_json(args.json, told)
    say(f"\n{text}")
    return {"output_dir": config.output_dir, "parts": parts, **{name: path for name, path in written.items() if path}}


def _parts(only: str | None) -> list[str]:
    asked = only.split(",") if only else list(PARTS)
    unknown = [part for part in asked if part not in PARTS]
    if unknown:
        raise ConfigError(f"--only knows no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    return [part for part in PARTS if part in asked]


def _measure(config: Config, parts: list[str], args: argparse.Namespace) -> dict[str, Any]:
    import torch

    threads = args.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    told: dict[str, Any] = {"notes": []}
    if {"machine", "training", "scoring"} & set(parts):
        told = _measure_model(config, parts, args.device)
    others: dict[str, Callable[[], dict[str, Any]]] = {
        "ray_overhead": lambda: _ray_overhead(config, threads, args.ray_overhead_users),
        "growth": lambda: _growth(config, _sizes(args.users, "--users"), _sizes(args.items, "--items")),
        "startup": lambda: _startup(config),
    }
    for part in parts:
        if part in others:
            say(f"benchmark: {part}")
            told[part] = others[part]()
    return told


def _measure_model(config: Config, parts: list[str], device: str) -> dict[str, Any]:
    """The parts without Ray, in this process."""
    from cllm4rec.experiments.benchmark.corpora import load_corpora
    from cllm4rec.experiments.benchmark.machine import machine, rate_now
    from cllm4rec.experiments.benchmark.scoring import scoring
    from cllm4rec.experiments.benchmark.training import Setting, training
    from cllm4rec.model.backbone import new_backbone
    from cllm4rec.model.precision import precision_on

    say("benchmark: machine")
    told: dict[str, Any] = {"machine": machine(device=device), "notes": []}
    if not {"training", "scoring"} & set(parts):
        return told
    corpora = load_corpora(Path(os.environ.get(_SHARED) or "../shared"))
    told["notes"] += corpora.notes
    backbone = new_backbone(config.model, corpora.histories.token_space.num_words, config.seed)
    micro_batch_tokens, max_tokens = config.training.micro_batch_tokens, config.model.max_tokens
    precision = precision_on(device, config.training.bf16)
    setting = Setting(micro_batch_tokens, max_tokens, config.score.batch_users, device=device, precision=precision)
    rate = rate_now(precision, device)
    told["precision"] = str(precision).removeprefix("torch.")
    told["notes"].append(
        f"training and scoring compute in {told['precision']}, and shares are of the machine's rate in it"
    )
    if "training" in parts:
        told["training"] = training(corpora, backbone, setting, rate, say)
    if "scoring" in parts:
        told["scoring"] = scoring(corpora, backbone, setting, rate, say)
    return told


def _refuse_without_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that torch can see; leave it out to measure the CPU")


def _sizes(words: str, flag: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",") if word]
    except ValueError:
        raise ConfigError(f"{flag} {words} should be whole numbers with commas between them") from None


def _ray_overhead(config: Config, threads: int, num_users: int) -> dict[str, Any]:
    import ray

    from cllm4rec.experiments.benchmark.ray_overhead import ray_overhead

    try:
        return ray_overhead(config, threads, num_users, connect, ray.shutdown)
    finally:
        ray.shutdown()  # the parts after it start their own, in new processes


def _growth(config: Config, users: list[int], items: list[int]) -> dict[str, Any]:
    from cllm4rec.experiments.benchmark.growth import growth

    return growth(config.output_dir, users, items, say)


def _startup(config: Config) -> dict[str, Any]:
    from cllm4rec.experiments.benchmark.startup import startup

    return startup(config)


COMMAND = Command(run, __doc__ or "", add_flags=add_flags, default_config="benchmark", needs_ray=False)
