"""The command line all jobs share: `python -m jobs.<stage> --config FILE [--force] [section.key=value ...]`.

Exit status 0 and a last line of JSON with what was written where; otherwise one sentence on stderr, the same JSON with
`error`, and status 1 (the run), 2 (the config) or 3 (an audit). An error that nobody foresaw adds its traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from cllm4rec import allocator
from cllm4rec.config import Config, load_config
from cllm4rec.errors import Cllm4RecError, ConfigError, ResourceError, causes, is_full_disk
from jobs import ENVIRONMENT
from jobs.progress import say

_CONNECT_TIMEOUT_S = 20.0
_AFTER_VERB = "section.key=value after these replace settings of the file; --config stands before the verb"

Job = Callable[[Config, argparse.Namespace], dict[str, Any]]
AddVerb = Callable[[str, str], argparse.ArgumentParser]
"""Name of a verb and a line of help → its parser, for operands and flags."""


def main(stage: str, description: str | None) -> None:
    """Run one stage of the pipeline, by its name, as a program."""

    def job(config: Config, args: argparse.Namespace) -> dict[str, Any]:
        from jobs.stages import STAGES, run_stage  # here: --help and a wrong config should not wait for Ray and torch

        return {stage: run_stage(STAGES[stage], config, args.force)}

    program(f"jobs.{stage}", description, job)


def program(
    name: str,
    description: str | None,
    job: Job,
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None,
    default_config: str | None = None,
    needs_ray: bool = True,
    add_verbs: Callable[[AddVerb], None] | None = None,
) -> None:
    """Parse, connect to Ray where the job needs it, run the job, print the last line, exit.

    With `add_verbs` the job does several things (`args.verb`), and overrides stand after the verb and its operands.
    """
    parser = _Parser(
        prog=f"python -m {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        required=default_config is None,
        default=default_config,
        help="YAML file of the run (see jobs/configs)",
    )
    parser.add_argument("--force", action="store_true", help="run even where the output is up to date")
    if add_verbs is None:
        parser.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's"
        )
    else:
        parser.has_verbs = True
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
        add_verbs(lambda verb, what: verbs.add_parser(verb, help=what, description=what, epilog=_AFTER_VERB))
    if add_flags is not None:
        add_flags(parser)
    sys.exit(_run(job, parser, needs_ray))


class _Parser(argparse.ArgumentParser):
    has_verbs = False

    def parse(self) -> argparse.Namespace:
        if not self.has_verbs:
            return self.parse_intermixed_args()
        # argparse knows verbs or lets overrides stand anywhere, not both: here they are what the verb does not take.
        args, words = self.parse_known_args()
        flags = [word for word in words if word.startswith("-")]
        if flags:
            self.error(f"unrecognized arguments: {' '.join(flags)}")
        args.overrides = words
        return args

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help tells how to call it")


def _run(job: Job, parser: _Parser, needs_ray: bool = True) -> int:
    try:
        args = parser.parse()
        config = load_config(args.config, args.overrides)
        if needs_ray:
            connect(config)
        told = job(config, args)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where it stopped", 130)
    except Exception as error:
        foreseen = _foreseen(error)
        if foreseen is not None:
            return _fail(str(foreseen).partition("\n")[0], foreseen.exit_status, foreseen.told)
        traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error}".partition("\n")[0], 1)
    print(json.dumps({"ok": True, "output_dir": config.output_dir, **told}, default=str), flush=True)
    return 0


def _fail(sentence: str, exit_status: int, told: Mapping[str, Any] | None = None) -> int:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    print(json.dumps({"ok": False, "error": sentence, **(told or {})}, default=str), flush=True)
    return exit_status


def _foreseen(error: BaseException) -> Cllm4RecError | None:
    """Our own error behind what was raised, if there is one; Ray's wrappers (with a `cause`) look like ours."""
    ours = [one for one in causes(error) if isinstance(one, Cllm4RecError) and not hasattr(one, "cause")]
    if is_full_disk(error) and not any(isinstance(one, ResourceError) for one in ours):
        return ResourceError("a disk is full; free some space and run the same command again")
    return ours[0] if ours else None


def connect(config: Config) -> None:
    """Join the cluster this job was submitted to (RAY_ADDRESS), or start a local Ray with what the config needs.

    Raises ResourceError where a named cluster does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _refuse_a_silent_cluster(address)
    # "local": without a word, Ray would join any cluster that happens to run on this machine.
    local = {"address": "local", "num_cpus": _local_cpus(config), "include_dashboard": False}
    workers_env = {name: os.environ[name] for name in ENVIRONMENT} | allocator.environment()
    if not config.cluster.use_gpu:
        workers_env["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would look for a GPU of the node
    try:
        ray.init(
            **({"address": address} if address else local),
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": workers_env},
        )
    except ConnectionError as error:
        raise _no_cluster(address, error) from None
    say(f"ray: {'cluster ' + address if address else 'local'}, {ray.cluster_resources().get('CPU', 0):g} CPUs, "
        f"{ray.cluster_resources().get('GPU', 0):g} GPUs")  # fmt: skip


def _refuse_a_silent_cluster(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdigit():  # else "auto" or the like, which Ray looks up
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise _no_cluster(address, error) from None


def _no_cluster(address: str | None, error: OSError) -> ResourceError:
    reason = str(error).partition("\n")[0]
    return ResourceError(f"no Ray cluster answers at {address} ({reason}); correct RAY_ADDRESS or unset it")


def _local_cpus(config: Config) -> int:
    """Logical CPUs of a local Ray: this machine's, and two more where the workers take all of them.

    Workers hold theirs for a whole stage, and Ray Data needs some to read with meanwhile.
    """
    cores = os.cpu_count() or 1
    processes = max(config.cluster.num_workers, config.score.num_actors, config.serve.min_replicas)
    return max(cores, min(cores, processes * config.cluster.cpus_per_worker) + 2)
