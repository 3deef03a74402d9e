"""Add new items to the current model: their embeddings are predicted from their texts, without training.

    cllm4rec extend --config my.yaml
    cllm4rec extend --config my.yaml extend.items.path=new_items.jsonl extend.items.columns.text=title

Reads the items of `extend.items`, or of `data.items` if that is null, and adds those that the current model does not know. What
a text says about an embedding is learned from the texts and the embeddings of the items that the model was trained on. The
extended model is written to `models/` and becomes the current one: `score`, `nightly` and a running endpoint follow. Run it
after `promote` and before `nightly`. If there are no new items, nothing changes. --force predicts items that were added earlier
again, too.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.extension.extend import extend
from cllm4rec.progress import show_count


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    result = extend(config, args.force, show_count)
    if result.new_items:
        say(
            f"extend: {result.model} is current, with {result.new_items:,} new items; their embeddings were predicted from "
            f"{result.reading}, which predict {max(0.0, result.r2):.0%} of the variance of the embedding of a trained item that is "
            f"left out ({result.fitted_items:,} items)"
        )
    else:
        say(f"extend: {result.model} knows all items with a text; nothing to do")
    return dataclasses.asdict(result)


COMMAND = Command(run, __doc__ or "", needs_ray=False)
