"""The overhead of Ray and DeepSpeed: the same epoch and the same lists with them and without them, in one run.

The model is small: an epoch with 100,000 users takes about a minute. The measurement without Ray is done before Ray starts and
after it has stopped, because the speed of a shared machine varies.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ragged import chunks
from cllm4rec.config import BackboneSize, Config
from cllm4rec.data.documents import Documents
from cllm4rec.data.prepared import load_documents, load_token_space
from cllm4rec.experiments.benchmark.directories import (
    empty_directory,
    random_histories,
    write_prepared,
    write_random_model,
)
from cllm4rec.experiments.benchmark.figures import Figures, summarize
from cllm4rec.model.backbone_files import load_backbone
from cllm4rec.model.cllm4rec import new_model
from cllm4rec.nightly.plan import plan_score
from cllm4rec.nightly.ray_job import score
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.storage import files
from cllm4rec.training.job import METRICS, TrainJob
from cllm4rec.training.loop import Shard, train
from cllm4rec.training.phases import COLLABORATIVE, Phase
from cllm4rec.training.ray_trainer import train_on_ray

_BACKBONE = BackboneSize(layers=4, width=256, heads=4, vocab_size=2048)
_NUM_ITEMS = 5_000
_BARE_EPOCHS, _RAY_EPOCHS = 3, 5
"""The first epoch of each measurement is not counted, because it warms up caches."""


def ray_overhead(
    config: Config,
    threads: int,
    num_users: int,
    connect: Callable[[Config], None],
    disconnect: Callable[[], None],
) -> Figures:
    """`training_lost` and `scoring_lost`: 1 - seconds without Ray / seconds with Ray. Starts and stops Ray."""
    config = _small(config, threads)
    folder = empty_directory(files.join(config.output_dir, "ray_overhead"))
    config = config.model_copy(update={"output_dir": folder})
    histories = random_histories(num_users, _NUM_ITEMS, config.seed)
    write_prepared(config.run.prepared, histories, _NUM_ITEMS, _BACKBONE.vocab_size)
    write_random_model(folder, config.model, config.training.bf16, config.seed)
    torch.set_num_threads(threads)
    bare_epochs, bare_scores = _bare_epochs(config), [_bare_scoring(config, histories)]
    connect(config)
    ray_epochs, ray_scores = _ray_epochs(config), [score(plan_score(config)).seconds["score"]]
    disconnect()  # an idle Ray still uses CPU time
    bare_epochs += _bare_epochs(config)
    bare_scores += [_bare_scoring(config, histories)]
    files.remove_directory(folder)
    figures = summarize(
        {
            "training_bare_s": bare_epochs,
            "training_ray_s": ray_epochs,
            "scoring_bare_s": bare_scores,
            "scoring_ray_s": ray_scores,
        }
    )
    lost = {
        f"{part}_lost": 1 - figures[f"{part}_bare_s"] / figures[f"{part}_ray_s"] for part in ("training", "scoring")
    }
    return figures | lost | {"users": num_users}


def _small(config: Config, threads: int) -> Config:
    cluster = config.cluster.model_copy(
        update={"num_workers": 1, "cpus_per_worker": threads, "threads_per_worker": threads}
    )
    model = config.model.model_copy(update={"backbone": _BACKBONE, "max_tokens": 128})
    return config.model_copy(update={"cluster": cluster, "model": model})


def _phase(epochs: int) -> Phase:
    return Phase("finetune", COLLABORATIVE, ("recommendations",), epochs, 1e-3, lambda_c=1.0, patience=epochs)


def _with_engine(config: Config, engine: str) -> Config:
    changes = {
        "engine": engine,
        "zero_stage": 0,
        "global_batch_tokens": None,
        "gradient_clipping": None,
        "checkpoint_every_epochs": _RAY_EPOCHS,
    }
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def _bare_epochs(config: Config) -> list[float]:
    prepared_dir = config.run.prepared
    prompt_tokens, token_space = load_token_space(prepared_dir)
    documents: Documents = load_documents(prepared_dir)
    entries: list[dict[str, Any]] = []

    def make_model() -> Any:
        backbone = load_backbone(config.run.backbone, config.model.max_tokens)
        return new_model(config.model, backbone, token_space, config.seed)

    phases, shard = [_phase(_BARE_EPOCHS)], Shard(documents, None)
    train(make_model, prompt_tokens.prompts, phases, shard, _with_engine(config, "torch"), log=entries.append)
    return _epoch_seconds(entries)


def _ray_epochs(config: Config) -> list[float]:
    job = TrainJob(
        config=_with_engine(config, "deepspeed"),
        phases=[_phase(_RAY_EPOCHS)],
        prepared_dir=files.absolute(config.run.prepared),
        backbone_dir=files.absolute(config.run.backbone),
        start=None,
        fingerprint="ray_overhead",
    )
    run_dir = files.join(config.output_dir, "runs", "ray_overhead")
    train_on_ray(job, run_dir)
    lines = files.read_bytes(files.join(run_dir, METRICS)).splitlines()
    return _epoch_seconds([json.loads(line) for line in lines])


def _epoch_seconds(entries: list[dict[str, Any]]) -> list[float]:
    return [entry["seconds"] for entry in entries if entry["event"] == "epoch"][1:]


def _bare_scoring(config: Config, histories: Histories) -> float:
    """Seconds from loading the model to the last list, in the batches of the Ray job. The lists are discarded."""
    began = time.monotonic()
    scorer, size = Scorer.load(config.run.model), config.score.batch_users
    read = histories.together("train", "validation", "test")
    for rows in chunks(len(histories.user), size):
        scorer.top_k(histories.user[rows], read.take(rows), config.score.k)
    return time.monotonic() - began
