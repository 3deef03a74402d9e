"""Start-up times: import, --help, a local Ray, loading a model. Each measurement is a new process."""

from __future__ import annotations

import os
import subprocess
import sys

from cllm4rec import allocator
from cllm4rec.config import Config
from cllm4rec.errors import ResourceError
from cllm4rec.experiments.benchmark.directories import (
    empty_directory,
    random_histories,
    write_prepared,
    write_random_model,
)
from cllm4rec.experiments.benchmark.figures import Figures, seconds_of, summarize
from cllm4rec.storage import files

_REPEATS = 3
_NUM_USERS, _NUM_ITEMS, _NUM_WORDS = 10_000, 10_000, 50_257
_START_RAY = (
    "import ray; ray.init('local', include_dashboard=False, log_to_driver=False, logging_level='error'); ray.shutdown()"
)


def startup(config: Config) -> Figures:
    """Seconds that a Python process takes for each task. The model is that of the configuration, with random weights."""
    folder = empty_directory(files.join(config.output_dir, "startup"))
    histories = random_histories(_NUM_USERS, _NUM_ITEMS, config.seed)
    write_prepared(files.join(folder, "prepared"), histories, _NUM_ITEMS, _NUM_WORDS)
    write_random_model(folder, config.model, config.training.bf16, config.seed)
    load = f"from cllm4rec.scoring.scorer import Scorer; Scorer.load({files.join(folder, 'model')!r})"
    commands = {
        "import_s": ["-c", "import cllm4rec"],
        "import_scorer_s": ["-c", "import cllm4rec.scoring.scorer"],
        "help_s": ["-m", "cllm4rec", "score", "--help"],
        "start_ray_s": ["-c", _START_RAY],
        "load_model_s": ["-c", load],
    }
    figures = summarize({name: seconds_of(lambda: _python(words), _REPEATS) for name, words in commands.items()})  # noqa: B023
    files.remove_directory(folder)
    return figures


def _python(words: list[str]) -> None:
    variables = allocator.without(os.environ)  # users start programs without the workers' allocator
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=variables)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ResourceError(f"python {' '.join(words)[:60]} failed during the start-up measurement: {last}")
