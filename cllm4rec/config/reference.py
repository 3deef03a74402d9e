"""docs/config.md from the sections of the configuration.

python -m cllm4rec.config.reference > docs/config.md

One table per section: setting, type and range, default, meaning.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from cllm4rec.config.schema import Config

Schema = dict[str, Any]
"""JSON schema of a section or a setting, as pydantic writes it."""

_OPENING = """\
# Configuration

<!-- Generated from cllm4rec/config/ by `python -m cllm4rec.config.reference`. Do not edit. -->

After this page you will know every setting, its range, its default and what it does.

One YAML file describes a run. Only `output_dir` and `data.interactions` are required:

```yaml
output_dir: runs/books
data:
  interactions: {path: notes.jsonl.gz, columns: {user: reader, item: book, rating: stars, text: note}}
pretrain:
  epochs: 20
```

`section.key=value` on the command line replaces a setting for one run:

    cllm4rec pipeline --config my.yaml pretrain.epochs=5 score.k=50

An unknown key, a value out of its range, or two settings that contradict each other stop the command with exit status 2 and a
sentence that names the key. `null` means that a setting has no value; its meaning is in the table. The shipped config `my_data`
holds the same settings as YAML.
"""
_HEADER = "| setting | type | default | meaning |\n|---|---|---|---|"
_NOUNS = {"integer": "integer", "number": "number", "string": "text", "object": "mapping"}
_PLURALS = {"value of any kind": "values of any kind"}


def page() -> str:
    """The whole page as Markdown."""
    root = Config.model_json_schema()
    sections = list(_sections(root, "", root["$defs"], {}))
    tables = [f"{heading}\n\n{intro}\n\n{table}\n" for heading, intro, table in sections]
    return "\n".join([_OPENING, *tables])


def _sections(
    section: Schema, key: str, definitions: dict[str, Schema], written: dict[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Heading, introduction and table of a section, then those of the sections inside it, each definition once.

    written: definition → dotted key of the section that documents it, filled on the way.
    """
    settings = section["properties"]
    inside = {name: _definition(setting) for name, setting in settings.items()}
    for name, definition in inside.items():
        if definition:
            written.setdefault(definition, f"{key}{name}")
    if key:
        heading, intro = f"{'##' if key.count('.') == 1 else '###'} `{key[:-1]}`", section["description"]
    else:
        heading, intro = "## Top level", "These keys stand at the start of a line. Each section has a table below."
    yield heading, _on_one_line(intro), "\n".join([_HEADER, *_rows(section, definitions, written)])
    for name, definition in inside.items():
        if definition and written[definition] == f"{key}{name}":
            yield from _sections(definitions[definition], f"{key}{name}.", definitions, written)


def _rows(section: Schema, definitions: dict[str, Schema], written: dict[str, str]) -> Iterator[str]:
    for name, setting in section["properties"].items():
        default = "required" if name in section.get("required", []) else _default(setting)
        # Pydantic leaves out a setting's description that equals its section's.
        meaning = setting.get("description") or definitions[_definition(setting) or ""]["description"]
        yield f"| `{name}` | {_type(setting, written)} | {default} | {_on_one_line(meaning)} |"


def _default(setting: Schema) -> str:
    value = setting["default"]
    if "$ref" in json.dumps(setting) and isinstance(value, dict):
        return "see its table"
    return f"`{value}`" if value and isinstance(value, str) else f"`{json.dumps(value)}`"


def _definition(setting: Schema) -> str | None:
    """The name of the section's definition that a setting holds, also as one of several types or in a list."""
    if "$ref" in setting:
        return str(setting["$ref"]).rpartition("/")[2]
    found = [_definition(inner) for inner in [*setting.get("anyOf", []), setting.get("items", {})] if inner]
    return next((name for name in found if name), None)


def _type(schema: Schema, written: dict[str, str], *, is_inner: bool = False) -> str:
    """A type with its range, as people write it: "integer ≥ 1", "one of `a`, `b`"."""
    if "$ref" in schema:
        key = written[str(schema["$ref"]).rpartition("/")[2]]
        return f"section [`{key}`](#{key.replace('.', '')})"
    if is_inner and "title" in schema:
        return str(schema["title"])
    if "anyOf" in schema:
        return " or ".join(_type(inner, written, is_inner=True) for inner in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return _list_type(schema, written)
    if schema["type"] == "boolean":
        return "`true` or `false`"
    if schema["type"] == "null":
        return "`null`"
    noun = "date" if schema.get("format") == "date" else _NOUNS[schema["type"]]
    return f"{noun}{_range(schema)}"


def _list_type(schema: Schema, written: dict[str, str]) -> str:
    if "prefixItems" in schema:
        return f"pair [{', '.join(_type(inner, written, is_inner=True) for inner in schema['prefixItems'])}]"
    inner = _type(schema["items"], written, is_inner=True)
    least = f", at least {schema['minItems']}" if schema.get("minItems") else ""
    noun, _, rest = inner.partition(" [")
    return f"list of {_PLURALS.get(noun, f'{noun}s')}{' [' if rest else ''}{rest}{least}"


def _range(schema: Schema) -> str:
    lowest, highest = schema.get("minimum"), schema.get("maximum")
    if lowest is not None and highest is not None:
        return f" from {lowest:g} to {highest:g}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return f" {' and '.join(bounds)}" if bounds else ""


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.stdout.write(page())
