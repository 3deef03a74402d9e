"""Run the whole pipeline on a generated data set, the sample world.

    cllm4rec demo

Writes raw review files of 2,000 users × 600 items to runs/demo/raw, then runs the pipeline with the configuration `demo`.
It takes less than 2 minutes on 2 cores. In the report, CLLM4Rec should be far above popularity and above EASE.
"""

from __future__ import annotations

import argparse
import posixpath
from typing import Any

from cllm4rec.commands import pipeline
from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.data.world import sample_world
from cllm4rec.storage.files import exists


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    reviews = str(config.data.interactions.path)
    raw = posixpath.dirname(reviews)
    if not exists(reviews):  # the last of the three files to be written
        say(f"demo: writing the sample world to {raw}")
        sample_world(raw)
    return pipeline.run(config, args)


COMMAND = Command(run, __doc__ or "", add_flags=pipeline.add_flags, default_config="demo")
