"""The rules that keep the parts apart, read from the imports themselves."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cllm4rec.commands.cli import COMMANDS

ROOT = Path(__file__).parents[1]
BASE = {"errors", "typing", "storage", "arrays", "run", "config"}
MAY_IMPORT = {
    # A room, or a module beside them → what it may import besides itself, lowest first.
    "errors": set(),
    "typing": set(),
    "allocator": set(),
    "storage": {"errors", "typing"},
    "arrays": {"errors", "typing", "storage"},
    "run": {"storage"},
    "config": {"errors", "run"},
    "cluster": {"errors", "config", "allocator"},
    "resources": {"errors", "config"},
    "reporting": set(),
    "progress": {"errors", "storage"},
    "staleness": {"config", "storage"},
    "data": BASE | {"resources", "staleness"},
    "metrics": {"errors", "typing", "arrays"},
    "model": BASE | {"data"},
    "training": BASE | {"resources", "progress", "staleness", "data", "metrics", "model"},
    "scoring": BASE | {"data", "model"},
    "evaluation": BASE | {"reporting", "staleness", "data", "metrics", "model", "scoring"},
    "nightly": BASE | {"resources", "reporting", "staleness", "data", "metrics", "model", "scoring"},
    "extension": BASE | {"data", "model"},
    "privacy": BASE | {"data", "nightly"},
    "stages": BASE | {"training"},
    "pipeline": BASE | {"resources", "progress", "stages", "data", "training", "evaluation", "nightly"},
    "python_api": BASE | {"stages", "data", "model", "training", "scoring"},
    "serving": BASE | {"scoring"},
    "experiments": BASE
    | {
        "staleness",
        "allocator",
        "cluster",
        "resources",
        "reporting",
        "data",
        "metrics",
        "model",
        "training",
        "scoring",
        "evaluation",
        "nightly",
        "extension",
    },
}
MAY_IMPORT["commands"] = {*MAY_IMPORT}
RAY_IS_ALLOWED_IN = (
    "cllm4rec.cluster.", "cllm4rec.resources.", "cllm4rec.data.ray_data.", "cllm4rec.training.ray_trainer.",
    "cllm4rec.nightly.ray_job.",    "cllm4rec.serving.", "cllm4rec.commands.",
)  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for folder in ("cllm4rec", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))}


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Modules that a module imports, at its top or in a function; for `from a import b` b if it is one."""
    return imported(module, list(ast.walk(syntax_of(module))))


@functools.cache
def imports_when_loaded(module: str) -> frozenset[str]:
    """Modules that are imported when a module is imported: those outside of functions."""
    nodes, waiting = [], [syntax_of(module)]
    while waiting:
        nodes.append(waiting.pop())
        waiting += [node for node in ast.iter_child_nodes(nodes[-1]) if not isinstance(node, FUNCTIONS)]
    return imported(module, nodes)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@functools.cache
def syntax_of(module: str) -> ast.AST:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(module: str, nodes: list[ast.AST]) -> frozenset[str]:
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(MODULES)) or {node.module}
    return frozenset(found)


def part(module: str) -> str:
    """`model` of cllm4rec.model.saved_model, `catalog` of cllm4rec.arrays.ids."""
    return module.split(".")[1] if "." in module else ""


def importers(*packages: str) -> set[str]:
    return {module for module in MODULES for name in imports(module) if name.split(".")[0] in packages}


def test_the_imports_are_really_read():
    assert {"ray.data", "cllm4rec.storage.files"} <= imports("cllm4rec.nightly.ray_job")
    assert "ray" in imports("cllm4rec.cluster"), "imports inside functions count"
    assert "cllm4rec.scoring.scorer" in imports("cllm4rec.scoring.recommender")
    assert len(MODULES) > 50


@pytest.mark.parametrize(
    "module", [name for name in MODULES if name.startswith("cllm4rec.") and not name.endswith("__main__")]
)
def test_parts_import_in_one_direction_only(module):
    ours = {name for name in imports(module) if name.startswith("cllm4rec.")}
    forbidden = {name for name in ours if part(name) not in MAY_IMPORT[part(module)] | {part(module)}}
    assert not forbidden, f"{module} may not import {forbidden}"


def test_no_module_imports_itself_through_others():
    @functools.cache
    def reached(module: str) -> frozenset[str]:
        direct = imports(module) & set(MODULES)
        return direct.union(*(reached(name) for name in direct))

    for module in MODULES:
        assert module not in reached(module)  # a circle would end in a RecursionError


def test_the_library_imports_no_programs():
    assert not {module for module in importers("jobs") if module.startswith("cllm4rec")}


def test_ray_stays_at_the_rim():
    assert not {module for module in importers("ray") if not f"{module}.".startswith(RAY_IS_ALLOWED_IN)}


def test_deepspeed_is_in_the_engine_and_in_zero3_only():
    assert importers("deepspeed") == {"cllm4rec.training.engine", "cllm4rec.training.zero3"}


def test_importing_what_does_not_need_ray_starts_and_imports_nothing_of_it():
    """Also through others: the plain functions stay usable, and fast to import, without a cluster."""

    @functools.cache
    def needs_ray(module: str) -> bool:
        return any(
            name.split(".")[0] == "ray" or (name in MODULES and needs_ray(name)) for name in imports_when_loaded(module)
        )

    plain = [
        module
        for module in MODULES
        if module.startswith("cllm4rec") and not needs_ray(module) and not module.endswith("__main__")
    ]
    for must in (
        "cllm4rec",
        "cllm4rec.data.prepare",
        "cllm4rec.python_api",
        "cllm4rec.scoring.scorer",
        "cllm4rec.model.saved_model",
        "cllm4rec.training.loop",
    ):
        assert must in plain
    code = f"import importlib, sys, threading\nfor name in {plain!r}: importlib.import_module(name)\n"
    code += "print(sorted({name.split('.')[0] for name in sys.modules} & {'ray', 'deepspeed', 'jobs'}))\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == ""


def test_every_command_has_a_door_for_ray_job_submit():
    doors = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__"}
    assert doors == set(COMMANDS)
    for name in doors:
        text = (ROOT / "jobs" / f"{name}.py").read_text(encoding="utf-8")
        assert f"python -m jobs.{name}" in (ast.get_docstring(ast.parse(text)) or "")
        assert len(text.splitlines()) <= 20


def test_nothing_names_a_path_of_one_machine():
    # /home/ray is the home folder inside of Ray's images.
    pattern = re.compile(r"(?<![\w.])/(home(?!/ray)|root|work|Users|mnt)/\w+")
    folders = [ROOT / name for name in ("cllm4rec", "jobs", "tests", "cluster", "docs", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    texts = [path for path in [*files, *ROOT.iterdir()] if path.is_file() and path != Path(__file__)]
    assert len(texts) > 80
    found = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    }
    assert not found
