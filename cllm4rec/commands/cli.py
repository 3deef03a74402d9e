"""The `cllm4rec` program: `cllm4rec <command> --config FILE [--force] [section.key=value ...]`.

`python -m jobs.<command>` is the same program for `ray job submit`. The last line on stdout is a short JSON object; the whole
result is in `<output_dir>/run.json`. On success the exit status is 0. On failure the JSON object has `error`, the same
sentence is on stderr, and the exit status is 1 (the run), 2 (the config or the command line), 3 (an audit) or 130
(interrupted). An unexpected error also prints its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import cllm4rec
from cllm4rec.cluster import connect, set_default_environment
from cllm4rec.commands.console import say
from cllm4rec.config import Config, load_config
from cllm4rec.errors import Cllm4RecError, ConfigError, ResourceError, causes, is_full_disk
from cllm4rec.storage.files import check_writable, exists, join, write_json

RUN_FILE = "run.json"
_VERB_EPILOG = (
    "Overrides (section.key=value) come last and replace settings of the file. --config comes before the verb."
)

COMMANDS = {
    "prepare": "raw interactions and texts → prepared/",
    "backbone": "build, load or train the language model → backbone/",
    "pretrain": "warm up and pretrain the ID tables → pretrained/",
    "finetune": "finetune the ID tables for recommendation → model/",
    "evaluate": "compare the model with popularity and EASE by full ranking → evaluation/",
    "score": "recommend a list to every user → dump/",
    "serve": "run the HTTP endpoint",
    "pipeline": "run all of the above in order and skip stages that are up to date",
    "nightly": "score with new events and rules, audit, measure drift → the next version of dump/",
    "extend": "add new items to the current model by their texts",
    "promote": "make a new model current if it is at least as good",
    "dump": "list versions of the published table; compare, restore, export, look up, vacuum",
    "erase": "erase users from every directory",
    "compare": "compare methods on the same splits with the same tuning budget",
    "coldstart": "measure how well new items are recommended by their texts",
    "plan": "print the memory that training and scoring need",
    "benchmark": "measure the speed of this machine and its utilization",
    "weights": "fetch a small pretrained language model",
    "demo": "run the pipeline on a generated sample world",
}
"""Command → one line of help. The module of the same name implements the command."""

Job = Callable[[Config, argparse.Namespace], dict[str, Any]]
"""Does the work of a command. `run.json` gets the whole result, the last line on stdout gets `report` (a path)."""
AddVerb = Callable[[str, str], argparse.ArgumentParser]
"""Adds a verb with a line of help and returns its parser, for operands and flags."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the program.

    add_verbs: adds subcommands (`args.verb`). Overrides then come after the verb and its operands.
    default_config: used without --config; None makes --config required.
    needs_ray: connect to Ray before `run`.
    trains: the command reads the language model, so a stock one is checked before Ray starts.
    writes: the command writes below output_dir, which is checked before Ray starts.
    check: raises before Ray starts what `run` would raise later, as far as that takes little time.
    has_force: the command takes --force.
    reads_config: False for a command without --config, overrides and `run.json`; its `run` gets the configuration `default_config`.
    """

    run: Job
    description: str
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None
    add_verbs: Callable[[AddVerb], None] | None = None
    default_config: str | None = None
    needs_ray: bool = True
    trains: bool = False
    writes: bool = True
    check: Callable[[Config], object] | None = None
    has_force: bool = True
    reads_config: bool = True


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point of the console script. The first word is the command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(cllm4rec.__version__)
        sys.exit(0)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0 if words else 2)
    if words[0] not in COMMANDS:
        sys.exit(_Outcome(words[0]).failed(f"unknown command {words[0]!r}; the commands are {', '.join(COMMANDS)}", 2))
    sys.exit(run_command(words[0], f"cllm4rec {words[0]}", words[1:]))


def run_command(name: str, prog: str, arguments: Sequence[str] | None = None, command: Command | None = None) -> int:
    """Parse, connect to Ray if the command needs it, run it, print the last line, and return the exit status.

    arguments: by default those of the process. command: by default the one of the module `cllm4rec.commands.<name>`.
    """
    set_default_environment()
    arguments = sys.argv[1:] if arguments is None else arguments
    command = command or importlib.import_module(f"cllm4rec.commands.{name}").COMMAND
    outcome = _Outcome(name)
    try:
        args = _parser(command, prog).parse(arguments)
        config = load_config(args.config, args.overrides)
        if command.reads_config:
            outcome.output_dir = config.output_dir
        with show_log():
            if command.trains and isinstance(config.model.backbone, str):
                from cllm4rec.model.stock_backbone import check_stock_backbone  # --help should not wait for torch

                check_stock_backbone(config.model)
            if command.writes and command.reads_config:
                check_writable(config.output_dir, "output_dir")
            if command.check is not None:
                command.check(config)
            if command.needs_ray:
                connect(config)
            with _signals_interrupt():
                result = command.run(config, args)
    except KeyboardInterrupt:
        return outcome.failed("interrupted; run the same command again to continue", 130)
    except Exception as error:
        expected = _expected(error)
        if expected is not None:
            return outcome.failed(str(expected).partition("\n")[0], expected.exit_status, expected.details)
        traceback.print_exc()
        return outcome.failed(f"{type(error).__name__}: {error}".partition("\n")[0], 1)
    outcome.output_dir = result.get("output_dir", outcome.output_dir)
    return outcome.succeeded(result)


class _Outcome:
    """The end of a command: a short last line on stdout, and the whole result in `run.json`."""

    def __init__(self, command: str) -> None:
        self.output_dir: str | None = None
        self._command, self._started = command, time.monotonic()

    def succeeded(self, result: Mapping[str, Any]) -> int:
        return self._end({"ok": True, "output_dir": self.output_dir, "report": result.get("report")}, result, 0)

    def failed(self, sentence: str, exit_status: int, details: Mapping[str, Any] | None = None) -> int:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        return self._end({"ok": False, "error": sentence}, details or {}, exit_status)

    def _end(self, short: dict[str, Any], result: Mapping[str, Any], exit_status: int) -> int:
        short |= {"seconds": round(time.monotonic() - self._started, 1)}
        # A full or read-only disk must not change the exit status. A read-only command must not create the directory.
        with contextlib.suppress(OSError):
            if self.output_dir is not None and exists(self.output_dir):
                write_json(join(self.output_dir, RUN_FILE), {"command": self._command, **short, "result": result})
        print(json.dumps(short, default=str), flush=True)
        return exit_status


def stage_command(stage: str, description: str | None) -> Command:
    """A command that runs one stage of the pipeline."""

    def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
        from cllm4rec.pipeline import STAGES
        from cllm4rec.stages import run_stage  # not at the top: --help should not wait for torch

        result = run_stage(STAGES[stage], config, args.force)
        return {stage: result, "report": result.get("report")}

    def check(config: Config) -> None:
        from cllm4rec.data.prepare import check_sources
        from cllm4rec.pipeline import STAGES

        if stage == "prepare":
            check_sources(config)
        elif stage != "score":  # its inputs may be large files of events
            STAGES[stage].is_done(config)

    return Command(run, description or "", trains=stage in _TRAINING, check=check)


_TRAINING = ("prepare", "backbone", "pretrain", "finetune")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cllm4rec <command> --config FILE [--force] [section.key=value ...]",
            "",
            *lines,
            "",
            "cllm4rec <command> --help describes a command. --config takes a file or the name of a shipped config.",
            "cllm4rec --version prints the version.",
        ]
    )


class _Parser(argparse.ArgumentParser):
    has_verbs = False

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        arguments = self._with_values(arguments)
        if not self.has_verbs:
            return self.parse_intermixed_args(arguments)
        # argparse cannot combine subparsers with intermixed arguments: words that the verb does not take are overrides.
        args, words = self.parse_known_args(arguments)
        flags = [word for word in words if word.startswith("-")]
        if flags:
            self.error(f"unrecognized arguments: {' '.join(flags)} (an id that begins with a dash comes after a --)")
        args.overrides = words
        return args

    def _with_values(self, arguments: Sequence[str]) -> list[str]:
        """`--user -x7` as `--user=-x7`: an id may begin with a dash, which argparse takes for a flag."""
        options = self._option_string_actions
        joined: list[str] = []
        for word in arguments:
            before = options.get(joined[-1]) if joined else None
            if before is not None and before.nargs is None and word.startswith("-") and word not in (*options, "--"):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return joined

    def error(self, message: str) -> NoReturn:
        if "required" in message and "--" not in message:  # an operand, which argparse may have taken for a flag
            message += " (one that begins with a dash comes after a --)"
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser(command: Command, prog: str) -> _Parser:
    parser = _Parser(prog=prog, description=command.description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if command.reads_config:
        parser.add_argument(
            "--config",
            required=command.default_config is None,
            default=command.default_config,
            help="YAML config file, or the name of a shipped config such as demo",
        )
    else:
        parser.set_defaults(config=command.default_config, overrides=[])
    if command.has_force:
        parser.add_argument("--force", action="store_true", help="run even if the output is up to date")
    if command.add_verbs is None and command.reads_config:
        parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a setting of the file")
    elif command.add_verbs is not None:
        parser.has_verbs = True
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
        command.add_verbs(
            lambda verb, summary: verbs.add_parser(verb, help=summary, description=summary, epilog=_VERB_EPILOG)
        )
    if command.add_flags is not None:
        command.add_flags(parser)
    return parser


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM and for the SystemExit of Ray's handlers, so that a stopped command ends like any
    other.

    Ray's own handler of SIGTERM prints a C++ stack. That of SIGINT during training calls sys.exit; from within `ray.get` its
    status is always 1. A library that ends the process for a reason of its own gives a sentence instead of a number.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if is_main else None
    try:
        yield
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            raise RuntimeError(stopped.code) from stopped
        raise KeyboardInterrupt from stopped
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _expected(error: BaseException) -> Cllm4RecError | None:
    """The Cllm4RecError that caused an error, or None. Ray's wrappers, which have a `cause`, are instances of it too."""
    own_errors = [cause for cause in causes(error) if isinstance(cause, Cllm4RecError) and not hasattr(cause, "cause")]
    if is_full_disk(error) and not any(isinstance(own_error, ResourceError) for own_error in own_errors):
        return ResourceError("a disk is full; free some space and run the same command again")
    return own_errors[0] if own_errors else None


class _SayHandler(logging.Handler):
    """Prints log records to stdout above a progress bar, with the level as a prefix of warnings and errors."""

    def emit(self, record: logging.LogRecord) -> None:
        has_prefix = record.levelno >= logging.WARNING
        say(f"{record.levelname.lower()}: {record.getMessage()}" if has_prefix else record.getMessage())


@contextlib.contextmanager
def show_log() -> Iterator[None]:
    """Print the log records of the library until the block ends."""
    library, handler = logging.getLogger("cllm4rec"), _SayHandler()
    level, propagates = library.level, library.propagate
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    library.propagate = False
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.setLevel(level)
        library.propagate = propagates
