"""The rules that keep the parts apart, read from the imports themselves."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a part may import besides itself. `errors` is below everything; artifacts, config and catalog come first.
FIRST = {"errors", "artifacts", "config", "catalog"}
MAY_IMPORT = {
    "errors": set(),
    "artifacts": {"errors"},
    "config": {"errors"},
    "allocator": set(),
    "catalog": {"errors", "artifacts"},
    "page": set(),
    "tombstones": FIRST,
    "registry": FIRST,
    "data": FIRST | {"tombstones"},
    "model": FIRST | {"data"},
    "training": FIRST | {"data", "model"},
    "baselines": FIRST | {"data", "evaluation"},
    "scoring": FIRST | {"page", "data", "model", "training", "tombstones", "registry"},
    "evaluation": FIRST | {"page", "data", "model", "training", "scoring", "baselines"},
    "promotion": FIRST | {"data", "scoring", "evaluation", "registry"},
    "benchmark": FIRST | {"allocator", "page", "data", "model", "training", "scoring"},
    "comparison": FIRST | {"page", "data", "model", "training", "scoring", "evaluation", "baselines"},
    "redact": FIRST | {"tombstones"},
    "erasure": FIRST | {"tombstones", "redact", "registry", "data", "scoring"},
}
RAY_IS_ALLOWED_IN = ("cllm4rec.data.", "cllm4rec.training.loop", "cllm4rec.scoring.batch", "jobs.", "serve.")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for folder in ("cllm4rec", "jobs", "serve")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Modules that a module imports, at its top or in a function; for `from a import b` b if it is one."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(MODULES)) or {node.module}
    return frozenset(found)


def part(module: str) -> str:
    """`model` of cllm4rec.model.store, `catalog` of cllm4rec.catalog."""
    return module.split(".")[1]


def importers(*packages: str) -> set[str]:
    return {module for module in MODULES for name in imports(module) if name.split(".")[0] in packages}


def test_the_imports_are_really_read():
    assert {"ray.data", "cllm4rec.artifacts"} <= imports("cllm4rec.scoring.batch")
    assert "ray" in imports("jobs.cli"), "imports inside functions count"
    assert "cllm4rec.scoring.scorer" in imports("serve.recommend")
    assert len(MODULES) > 50


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("cllm4rec.")])
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
    assert not {module for module in importers("jobs", "serve") if module.startswith("cllm4rec")}


def test_the_endpoint_imports_neither_jobs_nor_training():
    for module in MODULES:
        if module.startswith("serve"):
            assert not {name for name in imports(module) if name.startswith(("jobs", "cllm4rec.training"))}


def test_ray_stays_at_the_rim():
    assert not {module for module in importers("ray") if not f"{module}.".startswith(RAY_IS_ALLOWED_IN)}


def test_deepspeed_is_in_the_engine_only():
    assert importers("deepspeed") == {"cllm4rec.training.engine"}


def test_importing_what_does_not_need_ray_starts_and_imports_nothing_of_it():
    """Also through others: the plain functions stay usable, and fast to import, without a cluster."""

    @functools.cache
    def needs_ray(module: str) -> bool:
        return any(name.split(".")[0] == "ray" or (name in MODULES and needs_ray(name)) for name in imports(module))

    plain = [module for module in MODULES if module.startswith("cllm4rec") and not needs_ray(module)]
    for must in ("cllm4rec", "cllm4rec.scoring.scorer", "cllm4rec.model.store", "cllm4rec.training.run"):
        assert must in plain
    code = f"import importlib, sys, threading\nfor name in {plain!r}: importlib.import_module(name)\n"
    code += "print(sorted({name.split('.')[0] for name in sys.modules} & {'ray', 'deepspeed', 'jobs', 'serve'}))\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == ""


def test_entry_points_are_thin():
    """A stage's file is its story: what to run, what to expect, and one call."""
    for name in ("prepare", "backbone", "pretrain", "finetune", "evaluate", "score"):
        text = (ROOT / "jobs" / f"{name}.py").read_text(encoding="utf-8")
        assert f"python -m jobs.{name} --config" in ast.get_docstring(ast.parse(text))
        assert len(text.splitlines()) <= 20


def test_nothing_names_a_path_of_one_machine():
    # /home/ray is the home folder inside of Ray's images.
    pattern = re.compile(r"(?<![\w.])/(home(?!/ray)|root|work|Users|mnt)/\w+")
    folders = [ROOT / name for name in ("cllm4rec", "jobs", "serve", "tests", "cluster", ".ci")]
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
