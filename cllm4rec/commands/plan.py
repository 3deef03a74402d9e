"""Print the memory that training and scoring need, part by part, before anything runs.

    cllm4rec plan --config my.yaml
    cllm4rec plan --config my.yaml --users 1000000 --items 50000 --device cuda model.id_width=256

The numbers of users and items are those of the prepared data, or those that are given. Reads the config of a stock model and
none of its weights.
"""

from __future__ import annotations

import argparse
from typing import Any

from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import BackboneSize, Config
from cllm4rec.errors import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--users", type=int, metavar="N", help="default: those of the prepared data")
    parser.add_argument("--items", type=int, metavar="N", help="default: those of the prepared data")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda with cluster.use_gpu, otherwise cpu")


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    from cllm4rec.reporting import text_table  # not at the top: --help should not wait for torch
    from cllm4rec.training.memory import scoring_memory, training_memory

    sizes = _sizes(config, args)
    device = args.device or ("cuda" if config.cluster.use_gpu else "cpu")
    plans = {f"ZeRO-{stage}": training_memory(_with_zero(config, stage), sizes, device) for stage in range(4)}
    plans["scoring"] = scoring_memory(config, sizes, device)
    parts = list(dict.fromkeys(part for plan in plans.values() for part in plan.parts))
    rows = [[part, *(_gib(plan.parts.get(part)) for plan in plans.values())] for part in parts]
    rows.append(["total", *(_gib(plan.total) for plan in plans.values())])
    say(f"GiB of a training worker by ZeRO stage, and of a scoring actor or replica, on {device}")
    say(f"with {sizes.users:,} users, {sizes.items:,} items and {config.cluster.num_workers} training workers.")
    say(f"The config has ZeRO-{config.training.zero_stage}.")
    say("")
    say(text_table(["", *plans], rows))
    return {name: plan.parts for name, plan in plans.items()}


def _sizes(config: Config, args: argparse.Namespace) -> Any:
    from cllm4rec.data.prepared import load_token_space
    from cllm4rec.storage.files import exists, join
    from cllm4rec.training.memory import Sizes

    users, items, words = args.users, args.items, _num_words(config)
    if exists(join(config.run.prepared, "manifest.json")):
        prompt_tokens, space = load_token_space(config.run.prepared)
        users, items, words = users or space.num_users, items or space.num_items, prompt_tokens.num_words
    if not users or not items:
        raise ConfigError(
            f"{config.run.prepared} is not prepared yet; run cllm4rec prepare, or give --users and --items"
        )
    return Sizes(users, items, words)


def _num_words(config: Config) -> int:
    from cllm4rec.model.stock_backbone import stock_config

    if isinstance(config.model.backbone, BackboneSize):
        return config.model.backbone.vocab_size
    return int(stock_config(config.model.backbone, config.model.revision).get_text_config(decoder=True).vocab_size)


def _with_zero(config: Config, stage: int) -> Config:
    return config.model_copy(
        update={"training": config.training.model_copy(update={"engine": "deepspeed", "zero_stage": stage})}
    )


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


COMMAND = Command(run, __doc__ or "", add_flags=add_flags, needs_ray=False, trains=True, writes=False, has_force=False)
