"""What `ray job submit --working-dir .` uploads: the code alone, computed with Ray's own functions."""

import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", ".github", "cllm4rec", "cluster", "docs", "jobs", "tests")
RESULTS = (
    "runs/demo/model/model.safetensors",
    "raw/reviews.json.gz",
    "weights/smollm2-135m/tokenizer.json",
    "data/interactions.csv",
    "reviews.json.gz",
    "build/lib/cllm4rec/config.py",
    "dist/cllm4rec.whl",
    "cllm4rec.egg-info/PKG-INFO",
    ".git/objects/pack",
    ".venv/lib/torch.so",
    ".hypothesis/examples/one",
    ".mypy_cache/3.11/cache.json",
    "cllm4rec/data/__pycache__/world.pyc",
)
MEGABYTE = 1_000_000


@pytest.fixture
def checkout(tmp_path):
    """A copy of this checkout after some runs, with a config of its user."""
    copy = tmp_path / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, copy)
    for name in RESULTS:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(bytes(3 * MEGABYTE))
    (copy / "my.yaml").write_text("output_dir: s3://bucket/run\n")
    return copy


@pytest.mark.parametrize("include_gitignore", [True, False], ids=["with .gitignore", "without .gitignore"])
def test_a_submission_uploads_code_alone(checkout, tmp_path, include_gitignore):
    package = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(checkout), package, include_gitignore=include_gitignore, excludes=excludes)
    with ZipFile(package) as files:
        names = {file.filename for file in files.infolist()}
        size = sum(file.file_size for file in files.infolist())

    assert package.stat().st_size < 2 * MEGABYTE
    assert size < 2 * MEGABYTE
    assert {name.split("/")[0] for name in names if "/" in name} == {"cllm4rec", "jobs"}
    assert "my.yaml" in names
    assert not names & set(RESULTS)
    code = {path.relative_to(checkout).as_posix() for path in checkout.glob("cllm4rec/**/*.py")}
    assert code <= names
    assert {"cllm4rec/serving/page.html", "jobs/pipeline.py"} <= names
    shipped = {path.name for path in (ROOT / "cllm4rec" / "configs").glob("*.yaml")}
    for folder in ("cllm4rec/configs", "jobs/configs"):  # the second is a link to the first
        assert {f"{folder}/{name}" for name in shipped} <= names
