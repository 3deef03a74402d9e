"""The command line all jobs share: `python -m jobs.<stage> --config FILE [--force] [section.key=value ...]`.

Exit status 0 and a last line of JSON with what was written where; otherwise one sentence on stderr, the same JSON with
`error`, and status 1 (the run), 2 (the config) or 3 (an audit).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from cllm4rec.config import Config, load_config
from cllm4rec.errors import Cllm4RecError, ResourceError
from jobs.progress import say
from jobs.stages import Stage, run_stage

Job = Callable[[Config, argparse.Namespace], dict[str, Any]]


def main(stage: Stage, description: str | None) -> None:
    """Run one stage as a program."""
    program(f"jobs.{stage.name}", description, lambda config, args: {stage.name: run_stage(stage, config, args.force)})


def program(
    name: str,
    description: str | None,
    job: Job,
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None,
    default_config: str | None = None,
) -> None:
    """Parse, connect to Ray, run the job, print the last line, exit."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=default_config is None, default=default_config, help="YAML file of the run (see jobs/configs)"
    )
    parser.add_argument("--force", action="store_true", help="run even where the output is up to date")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    if add_flags is not None:
        add_flags(parser)
    args = parser.parse_intermixed_args()
    sys.exit(_run(job, args))


def _run(job: Job, args: argparse.Namespace) -> int:
    try:
        config = load_config(args.config, args.overrides)
        connect(config)
        told = job(config, args)
    except Cllm4RecError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        print(json.dumps({"ok": False, "error": str(error)}), flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on where it stopped", file=sys.stderr, flush=True)
        print(json.dumps({"ok": False, "error": "interrupted"}), flush=True)
        return 130
    print(json.dumps({"ok": True, "output_dir": config.output_dir, **told}, default=str), flush=True)
    return 0


def connect(config: Config) -> None:
    """Join the cluster this job was submitted to, or start a local Ray with what the config needs.

    Raises ResourceError where a named cluster does not answer.
    """
    # Before Ray is imported: quiet, and DeepSpeed on the CPU where no GPU is asked for.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    workers_env = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if not config.cluster.use_gpu:
        workers_env["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": workers_env})
        else:
            # Logical CPUs: the workers hold theirs for a whole stage and Ray Data needs some to read with meanwhile.
            cpus = max(os.cpu_count() or 1, config.cluster.num_workers * config.cluster.cpus_per_worker + 2)
            ray.init(
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": workers_env},
            )
    except ConnectionError as error:
        raise ResourceError(f"no Ray cluster answers at {address} ({error}); start one or unset RAY_ADDRESS") from None
    say(f"ray: {'cluster ' + address if address else 'local'}, {ray.cluster_resources().get('CPU', 0):g} CPUs, "
        f"{ray.cluster_resources().get('GPU', 0):g} GPUs")  # fmt: skip
