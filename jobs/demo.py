"""The whole chain over the sample world, nothing needed but this repository: what `make demo` runs.

    python -m jobs.demo

Writes 2,000 users × 600 items as raw review files to runs/demo/raw, then runs jobs.pipeline with
jobs/configs/demo.yaml. Under 2 minutes on 2 cores; CLLM4Rec should end far above popularity, and above EASE.
"""

from __future__ import annotations

import argparse
import posixpath
from typing import Any

from cllm4rec.artifacts import exists
from cllm4rec.config import Config
from cllm4rec.data.world import sample_world
from jobs import pipeline
from jobs.cli import program
from jobs.progress import say


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    reviews = str(config.data.interactions.path)
    raw = posixpath.dirname(reviews)
    if not exists(reviews):  # the last of the three files to get its name
        say(f"demo: writing the sample world to {raw}")
        sample_world(raw)
    return pipeline.run(config, args)


if __name__ == "__main__":
    program("jobs.demo", __doc__, run, pipeline.add_flags, default_config="jobs/configs/demo.yaml")
