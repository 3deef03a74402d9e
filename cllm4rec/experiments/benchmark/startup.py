"""How long the first second takes: import, --help, a local Ray, a model from disk. Every time in a new process."""

from __future__ import annotations

import os
import subprocess
import sys

from cllm4rec import allocator
from cllm4rec.config import Config
from cllm4rec.errors import ResourceError
from cllm4rec.experiments.benchmark.directories import fresh, random_histories, write_prepared, write_random_model
from cllm4rec.experiments.benchmark.figures import Row, row, seconds_of
from cllm4rec.storage import files

_REPEATS = 3
_NUM_USERS, _NUM_ITEMS, _NUM_WORDS = 10_000, 10_000, 50_257
_START_RAY = (
    "import ray; ray.init('local', include_dashboard=False, log_to_driver=False, logging_level='error'); ray.shutdown()"
)


def startup(config: Config) -> Row:
    """Seconds from starting Python to its end, for each of these; the model is the config's, with random weights."""
    folder = fresh(files.join(config.output_dir, "startup"))
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
    told = row({name: seconds_of(lambda: _python(words), _REPEATS) for name, words in commands.items()})  # noqa: B023
    files.remove_directory(folder)
    return told


def _python(words: list[str]) -> None:
    variables = allocator.without(os.environ)  # programs are not started with the workers' allocator
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=variables)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ResourceError(f"python {' '.join(words)[:60]} failed while start-up was measured: {last}")
