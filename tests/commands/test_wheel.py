"""The wheel: what is in it, and that it works in an environment of its own, outside of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest
from support.runs import write_config

import cllm4rec
from cllm4rec.commands.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
Run = Callable[..., str]
"""Runs a program of the environment with the wheel, and returns its stdout."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout, where a build leaves its files; no package index is needed."""
    pytest.importorskip("pip", reason="pip is not installed in this environment")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("cllm4rec", "jobs", "tests"):
        shutil.copytree(ROOT / name, folder / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "src")
    (folder / "src" / "raw").mkdir()
    (folder / "src" / "raw" / "reviews.jsonl").write_text("{}\n")
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "src")]
    subprocess.run(build, check=True, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A fresh environment with the wheel. It finds the dependencies in this one, but not the checkout."""
    folder = tmp_path_factory.mktemp("fresh")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True, env=environment
    )
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    # Python does not read the .pth files of a folder that a .pth file names: an editable install stays behind.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(dependencies))

    def run_program(program: str, *words: str) -> str:
        command = [str(folder / "venv" / "bin" / program), *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run_program


def test_the_wheel_holds_the_package_with_its_configs_and_its_page(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = ROOT / "cllm4rec"
    wanted = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    wanted |= {f"cllm4rec/configs/{path.name}" for path in (package / "configs").glob("*.yaml")}
    wanted |= {"cllm4rec/serving/page.html"}
    information = f"cllm4rec-{cllm4rec.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(information)} == wanted
    assert {f"{information}METADATA", f"{information}entry_points.txt", f"{information}licenses/LICENSE"} <= names


def test_the_installed_command_works_outside_of_the_checkout(run: Run) -> None:
    assert run("cllm4rec", "--version") == f"{cllm4rec.__version__}\n"
    overview = run("cllm4rec", "--help")
    assert all(f"  {command} " in overview for command in COMMANDS)
    assert Path(run("python", "-c", "import cllm4rec; print(cllm4rec.__file__)").strip()).parts[-6:-4] == (
        "venv",
        "lib",
    )


@pytest.mark.ray
def test_the_installed_package_goes_from_raw_files_to_recommendations(run: Run, tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    for command in ("prepare", "backbone", "pretrain", "finetune"):
        last = json.loads(run("cllm4rec", command, "--config", config).splitlines()[-1])
        assert (last["ok"], last["output_dir"]) == (True, str(tmp_path / "out"))

    code = (
        "import json, sys; from cllm4rec import Recommender\n"
        "items = Recommender.from_pretrained(sys.argv[1]).recommend(user_id='user-00', k=3)\n"
        "print(json.dumps([[item.item_id, item.score, item.text] for item in items]))\n"
    )
    items = json.loads(run("python", "-c", code, str(tmp_path / "out")))
    assert len({item_id for item_id, _, _ in items}) == 3
    assert [score for _, score, _ in items] == sorted((score for _, score, _ in items), reverse=True)
    assert all(text.startswith("a thing that is") for _, _, text in items)
