"""The `cllm4rec` program: `cllm4rec <command> --config FILE [--force] [section.key=value ...]`.

`python -m jobs.<command>` is the same for `ray job submit`. Exit status 0 and a short last line of JSON on success, with
everything in `<output_dir>/run.json`; otherwise one sentence on stderr, the same line with `error`, and status 1 (the
run), 2 (the config or the command line) or 3 (an audit). An unexpected error adds its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import cllm4rec
from cllm4rec.cluster import connect, set_default_environment
from cllm4rec.commands.console import say
from cllm4rec.config import Config, load_config
from cllm4rec.errors import Cllm4RecError, ConfigError, ResourceError, causes, is_full_disk
from cllm4rec.storage.files import exists, join, write_json

RUN_FILE = "run.json"
_AFTER_VERB = "section.key=value after these replace settings of the file; --config stands before the verb"

COMMANDS = {
    "prepare": "raw interactions and texts → prepared/",
    "backbone": "build, load or train the language model → backbone/",
    "pretrain": "content warm-up and pretraining of the ID tables → pretrained/",
    "finetune": "recommendation-oriented finetuning → model/",
    "evaluate": "full ranking beside popularity and EASE → evaluation/",
    "score": "a list for every user → dump/",
    "serve": "the live endpoint",
    "pipeline": "all of the above, in order, skipping what is up to date",
    "nightly": "score with new events, rules, audit and drift → the next version of dump/",
    "promote": "make a new model current if it is at least as good",
    "dump": "versions, comparison, restore, export, lookup and vacuum of the published table",
    "erase": "erase users from every directory",
    "compare": "every method on the same splits with the same budget",
    "benchmark": "how fast this machine is and how much of that is used",
    "demo": "the whole chain over a generated sample world",
}
"""Command → one line of help; the module of the same name holds the rest."""

Job = Callable[[Config, argparse.Namespace], dict[str, Any]]
"""Does the work. Of what it returns, `report` (a path) is shown on the last line, everything is in `run.json`."""
AddVerb = Callable[[str, str], argparse.ArgumentParser]
"""Name of a verb and a line of help → its parser, for operands and flags."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the program. With `add_verbs` it does several things (`args.verb`), and overrides stand after the
    verb and its operands.
    """

    run: Job
    description: str
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None
    add_verbs: Callable[[AddVerb], None] | None = None
    default_config: str | None = None
    needs_ray: bool = True


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: the first word names the command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(cllm4rec.__version__)
        sys.exit(0)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0 if words else 2)
    if words[0] not in COMMANDS:
        sys.exit(_Outcome(words[0]).failed(f"cllm4rec has no command {words[0]!r}; it has {', '.join(COMMANDS)}", 2))
    run_command(words[0], f"cllm4rec {words[0]}", words[1:])


def run_command(name: str, prog: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Parse, connect to Ray where the command needs it, run it, print the last line, exit."""
    set_default_environment()
    command: Command = importlib.import_module(f"cllm4rec.commands.{name}").COMMAND
    sys.exit(execute(command, name, prog, sys.argv[1:] if arguments is None else arguments))


def execute(command: Command, name: str, prog: str, arguments: Sequence[str]) -> int:
    """Run a command and print its last line; returns the exit status."""
    outcome = _Outcome(name)
    try:
        args = _parser(command, prog).parse(arguments)
        config = load_config(args.config, args.overrides)
        outcome.output_dir = config.output_dir
        with shown_log():
            if command.needs_ray:
                connect(config)
            result = command.run(config, args)
    except KeyboardInterrupt:
        return outcome.failed("interrupted; the same command continues where it stopped", 130)
    except Exception as error:
        expected = _expected(error)
        if expected is not None:
            return outcome.failed(str(expected).partition("\n")[0], expected.exit_status, expected.details)
        traceback.print_exc()
        return outcome.failed(f"{type(error).__name__}: {error}".partition("\n")[0], 1)
    outcome.output_dir = result.get("output_dir", outcome.output_dir)
    return outcome.succeeded(result)


class _Outcome:
    """How a command ends: a short last line on stdout, and the whole in `run.json`."""

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
        # A full or read-only disk must not change how a run ends, and a command that only looks makes no folder.
        with contextlib.suppress(OSError):
            if self.output_dir is not None and exists(self.output_dir):
                write_json(join(self.output_dir, RUN_FILE), {"command": self._command, **short, "result": result})
        print(json.dumps(short, default=str), flush=True)
        return exit_status


def stage_command(stage: str, description: str | None) -> Command:
    """The command that runs one stage of the pipeline."""

    def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
        from cllm4rec.pipeline import STAGES, run_stage  # here: --help and a wrong config should not wait for torch

        result = run_stage(STAGES[stage], config, args.force)
        return {stage: result, "report": result.get("report")}

    return Command(run, description or "")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cllm4rec <command> --config FILE [--force] [section.key=value ...]",
            "",
            *lines,
            "",
            "cllm4rec <command> --help describes a command; --config takes a file or the name of a shipped config.",
        ]
    )


class _Parser(argparse.ArgumentParser):
    has_verbs = False

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        if not self.has_verbs:
            return self.parse_intermixed_args(arguments)
        # argparse knows verbs or lets overrides stand anywhere, not both: here they are what the verb does not take.
        args, words = self.parse_known_args(arguments)
        flags = [word for word in words if word.startswith("-")]
        if flags:
            self.error(f"unrecognized arguments: {' '.join(flags)}")
        args.overrides = words
        return args

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help shows how to call it")


def _parser(command: Command, prog: str) -> _Parser:
    parser = _Parser(prog=prog, description=command.description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        required=command.default_config is None,
        default=command.default_config,
        help="YAML file of the run, or the name of a shipped config such as demo",
    )
    parser.add_argument("--force", action="store_true", help="run even if the output is up to date")
    if command.add_verbs is None:
        parser.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file"
        )
    else:
        parser.has_verbs = True
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
        command.add_verbs(lambda verb, what: verbs.add_parser(verb, help=what, description=what, epilog=_AFTER_VERB))
    if command.add_flags is not None:
        command.add_flags(parser)
    return parser


def _expected(error: BaseException) -> Cllm4RecError | None:
    """Our own error behind what was raised, if there is one; Ray's wrappers (with a `cause`) look like ours."""
    ours = [one for one in causes(error) if isinstance(one, Cllm4RecError) and not hasattr(one, "cause")]
    if is_full_disk(error) and not any(isinstance(one, ResourceError) for one in ours):
        return ResourceError("a disk is full; free some space and run the same command again")
    return ours[0] if ours else None


class _SayHandler(logging.Handler):
    """The library's log lines as a command shows them: on stdout, warnings marked, without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        is_marked = record.levelno >= logging.WARNING
        say(f"{record.levelname.lower()}: {record.getMessage()}" if is_marked else record.getMessage())


@contextlib.contextmanager
def shown_log() -> Iterator[None]:
    """Show the library's log lines while a command runs."""
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
