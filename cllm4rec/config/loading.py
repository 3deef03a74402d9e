"""From a YAML file and `section.key=value` overrides to a checked `Config`, or one sentence that names every wrong key."""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cllm4rec.config.schema import Config
from cllm4rec.errors import ConfigError

_Section = TypeVar("_Section", bound=BaseModel)

RENAMED = {"model.table_start": "model.table_init"}
"""Settings of older config files → their names now, for the error that refuses the old one."""


def load_config(path: str | os.PathLike[str], overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file or a shipped config, apply `section.key=value` overrides, and return the checked config.

    path: a file, or the bare name of a shipped config such as "demo". Relative paths in the config stay relative to the
    working directory, as `ray job submit --working-dir` expects. Raises ConfigError with one sentence that names the key.
    """
    try:
        text = (_shipped(path) or Path(path)).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}; give a YAML file to --config") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the config {path} is not UTF-8 text; give a YAML file to --config") from None
    try:
        raw = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} has no sections; start with output_dir and data, as the shipped config my_data does")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> Config:
    """Check a plain dictionary against the schema. Raises ConfigError that names every wrong key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"invalid config: {'; '.join(_sentences(error, raw))}") from None


def parse_section(kind: type[_Section], name: str, raw: Mapping[str, Any]) -> _Section:
    """Check a plain dictionary against one section. Raises ConfigError that names every wrong key with its section `name`."""
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        names = dict.fromkeys(_key(problem, raw) for problem in error.errors())
        sentences = [_sentence(f"{name}.{key}", [p for p in error.errors() if _key(p, raw) == key]) for key in names]
        raise ConfigError("; ".join(sentences)) from None


def _shipped(name: str | os.PathLike[str]) -> Traversable | None:
    """The shipped config that a bare word names; None for a path."""
    if not re.fullmatch(r"\w+", os.fspath(name)) or os.path.isfile(name):
        return None
    configs = {
        file.name.removesuffix(".yaml"): file
        for file in resources.files("cllm4rec.configs").iterdir()
        if file.name.endswith(".yaml")
    }
    if name not in configs:
        raise ConfigError(
            f"there is no file {name} and no shipped config of that name; the shipped configs are "
            f"{', '.join(sorted(configs))}"
        )
    return configs[os.fspath(name)]


# YAML and overrides


class _Loader(yaml.SafeLoader):
    """YAML in which a date stays text and a repeated key is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in the base class
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} appears twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _yaml_problem(path: str | os.PathLike[str], error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None:
        return f"{path} is not valid YAML: {' '.join(str(error).split())}"
    return f"{path} is not valid YAML in line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"the override {override!r} is not of the form section.key=value")
    *sections, last = key.split(".")
    target = raw
    for name in sections:
        target[name] = target.get(name) or {}  # a section without settings reads as null
        target = target[name]
        if not isinstance(target, dict):
            raise ConfigError(f"the override {override!r} goes through {name!r}, which is a value and not a section")
    try:
        target[last] = _load_yaml(value)
    except yaml.YAMLError:
        raise ConfigError(f"the value of the override {override!r} is not valid YAML; quote it") from None


# Errors of the schema as sentences


def _sentences(error: ValidationError, raw: Mapping[str, Any]) -> list[str]:
    """One sentence per wrong key of the file, however many branches of a union pydantic tried for it."""
    problems: dict[str, list[Any]] = {}
    for problem in error.errors():
        problems.setdefault(_key(problem, raw), []).append(problem)
    inner = [key for key in problems if not key or not any(other.startswith(f"{key}.") for other in problems)]
    return [_sentence(key, problems[key]) for key in inner]


def _key(problem: Any, raw: Any) -> str:
    """The dotted key of a problem as the file spells it: pydantic's location also names branches of unions."""
    keys: list[str] = []
    for part in problem["loc"]:
        is_written = part in raw if isinstance(raw, Mapping) else isinstance(raw, list) and isinstance(part, int)
        if is_written:
            keys.append(str(part))
            raw = raw[part]
    if problem["type"] == "missing":
        keys.append(str(problem["loc"][-1]))
    return ".".join(keys)


def _sentence(key: str, problems: list[Any]) -> str:
    ours = [problem["msg"].removeprefix("Value error, ") for problem in problems if problem["type"] == "value_error"]
    if ours:  # a sentence names its key, except in a section that occurs in several places
        return "; ".join(sentence if key in sentence else f"{key}: {sentence}" for sentence in ours)
    if problems[0]["type"] == "missing":
        return f"{key} is missing"
    if problems[0]["type"] == "extra_forbidden":
        return f"{key} is now {RENAMED[key]}" if key in RENAMED else f"{key} is not a setting{_suggestion(key)}"
    reasons = [_in_plain_words(problem["msg"]) for problem in problems]
    value = problems[0]["input"]
    given = f"is {json.dumps(value)} and " if isinstance(value, str | int | float | None) else ""
    return f"{key} {given}should {' or '.join(dict.fromkeys(reasons))}"


def _in_plain_words(message: str) -> str:
    """The end of a sentence "... should", from a message of pydantic such as "Input should be a valid integer"."""
    reason = re.sub(r"^\w+ should | or instance of \w+|, (unable to|got a|unexpected) .*", "", message)
    for theirs, ours in _PLAIN_WORDS.items():
        reason = reason.replace(theirs, ours)
    return reason


_PLAIN_WORDS = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text (a number in quotes is text)",
    "a valid boolean": "true or false",
    "a valid dictionary": "a section of settings",
    "a valid list": "a list",
}


def _suggestion(key: str) -> str:
    """What an unknown key may have meant: the only setting of its name elsewhere, or the most similar name in its section."""
    section, _, last = key.rpartition(".")
    meant = [name for name in _names() if name.rpartition(".")[2] == last]
    if len(meant) != 1:
        siblings = {name.rpartition(".")[2]: name for name in _names() if name.rpartition(".")[0] == section}
        meant = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1, cutoff=0.7)]
    return f" (did you mean {meant[0]}?)" if meant else ""


@functools.cache
def _names() -> list[str]:
    """The dotted names of all sections and settings."""
    return list(_names_in(Config, ""))


def _names_in(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _names_in(kind, f"{prefix}{name}.")
