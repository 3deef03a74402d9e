"""The documentation: its site builds without a warning, and the files, commands and tests it names exist."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cllm4rec.commands.cli import COMMANDS
from cllm4rec.config import reference

ROOT = Path(__file__).parents[1]
STANDALONE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "cluster/README.md")
"""Pages that are also read outside of the site."""
# The log keeps dated entries as they were, with commands of their time.
PAGES = [ROOT / name for name in STANDALONE] + [
    path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md"
]


def code(path: Path) -> Iterator[str]:
    """The code of a page: inline code, and lines of indented and fenced blocks."""
    is_fenced = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            yield line
        else:
            yield from re.findall(r"`([^`]+)`", line)


def named(pattern: str) -> set[tuple[str, str]]:
    """What a pattern's group finds in the code of all pages, each with the name of its page."""
    found = {(path.name, word) for path in PAGES for line in code(path) for word in re.findall(pattern, line)}
    assert found, f"no page has {pattern}"
    return found


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason='sphinx is not installed; pip install -e ".[dev]"')
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run([*build, "docs", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Recommender" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")


def test_the_configuration_page_is_that_of_the_schema():
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    command = "python -m cllm4rec.config.reference > docs/config.md"
    assert written == reference.page(), f"docs/config.md is not that of the schema; run `{command}` (or `make docs`)"


def test_the_readme_has_at_most_180_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.parametrize("name", STANDALONE)
def test_relative_links_lead_to_files(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    relative = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert not [link for link in relative if not (page.parent / link).exists()]


def test_commands_in_the_documentation_exist():
    commands = named(r"(?:^|[\s`])cllm4rec ([a-z][\w-]*)") | named(r"python -m jobs\.(\w+)")
    commands -= {(page, word) for page, word in commands if word == "import"}  # from cllm4rec import ...
    assert not {(page, word) for page, word in commands if word not in COMMANDS}


def test_modules_in_the_documentation_exist():
    modules = named(r"python -m (cllm4rec[\w.]*)")
    assert not {(page, name) for page, name in modules if importlib.util.find_spec(name) is None}


def test_configs_in_the_documentation_are_shipped():
    shipped = {path.stem for path in (ROOT / "cllm4rec" / "configs").glob("*.yaml")}
    assert not {(page, name) for page, name in named(r"--config (\w+)(?![\w./-])") if name not in shipped | {"FILE"}}


def test_make_targets_in_the_documentation_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert not {(page, name) for page, name in named(r"(?:^ *|`)make (\w+)") if name not in targets}


def test_test_files_in_the_documentation_exist():
    paths = named(r"(?<![\w./])(tests/[\w./]*)")
    assert not {(page, path) for page, path in paths if not (ROOT / path).exists()}


def test_selections_of_tests_in_the_documentation_find_tests():
    """Every word of `pytest tests/x -k "a or b"` is in the name of a test, or of a file of tests, below that path."""
    commands = {(page.name, line) for page in PAGES for line in code(page) if re.search(r"pytest tests/.* -k ", line)}
    assert commands
    empty = [(page, line, word) for page, line in commands for word in selected(line) if not is_a_name(line, word)]
    assert not empty


def selected(line: str) -> list[str]:
    quoted, plain = re.search(r'-k (?:"([^"]+)"|(\w+))', line).groups()
    return [word for word in re.findall(r"\w+", quoted or plain) if word not in ("and", "or", "not")]


def is_a_name(line: str, word: str) -> bool:
    paths = [ROOT / path for path in re.findall(r"tests/[\w./]+", line)]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
    return any(
        word in name.lower() for file in files for name in [file.stem, *re.findall(r"def (test_\w+)", file.read_text())]
    )


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"]), ids=lambda path: path.name
)
def test_workflows_and_forms_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
