"""Time and memory of a training step and a scoring pass with a large catalog.

    python -m cllm4rec.experiments.benchmark.catalog 1000000

It runs in a process of its own, so that its memory can be measured. The backbone is small, so that the head and the tables
dominate.
"""

from __future__ import annotations

import json
import resource
import sys

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch

from cllm4rec.arrays.ids import Catalog, TokenSpace
from cllm4rec.config import BackboneSize, TrainingConfig
from cllm4rec.data.documents import Prompts
from cllm4rec.experiments.benchmark.directories import random_histories
from cllm4rec.experiments.benchmark.figures import seconds_of
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.built_backbone import build_backbone
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.packing import Packer
from cllm4rec.model.ranker import Ranker
from cllm4rec.model.sampling import ItemSampler
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.training.engine import make_engine
from cllm4rec.training.epochs import EpochBuilder
from cllm4rec.training.phases import COLLABORATIVE

_NUM_USERS, _NUM_WORDS, _WIDTH, _REPEATS = 512, 512, 64, 3
_SAMPLED = 16_384


def catalog(num_items: int) -> dict[str, float]:
    """Seconds of a training step and of scoring 512 users; memory of the four tables, and the memory that scoring adds."""
    size = BackboneSize(layers=1, width=_WIDTH, heads=2, vocab_size=_NUM_WORDS)
    token_space = TokenSpace(_NUM_WORDS, _NUM_USERS, num_items)
    model = CLLM4Rec(build_backbone(size, _NUM_WORDS, 64, 0), token_space)
    prompts = Prompts.tokenize(lambda text: [len(text)])
    histories = random_histories(_NUM_USERS, num_items, 0)
    catalog = Catalog([""] * _NUM_USERS, [""] * num_items)
    scorer = Scorer(Ranker(model, prompts, 64), catalog, "")
    loaded_mb = psutil.Process().memory_info().rss / 1e6
    lists = seconds_of(lambda: scorer.top_k(histories.user, histories.train, 20), _REPEATS)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    model.train_only(COLLABORATIVE)
    engine = make_engine(model, TrainingConfig(engine="torch"), 1e-3)
    builder = EpochBuilder(prompts, token_space, 64, 0)
    source = prompts.interactions(token_space, histories.user, histories.train)
    documents = builder.recommendations(source, 0, mask_range=(0.2, 0.2), all_targets=False, user_dropout=0.0)
    batch = next(iter(Packer(token_space, 128 * 64, 64).batches([documents])))

    sampler = ItemSampler.from_documents(source, token_space, _SAMPLED, 0)

    def step(sampler: ItemSampler | None = None) -> None:
        sample = sampler.draw(0, 0) if sampler else None
        losses = engine.forward(batch_to_device(batch, torch.device("cpu"), sample=sample), 1.0)
        engine.backward(losses.total / batch.num_documents)
        engine.step()

    return {
        "step_s": float(np.median(seconds_of(step, _REPEATS))),
        "sampled_step_s": float(np.median(seconds_of(lambda: step(sampler), _REPEATS))),
        "score_s": float(np.median(lists)),
        "tables_mb": 4.0 * _WIDTH * 2 * (_NUM_USERS + num_items) / 1e6,
        # An upper bound: building the model may have needed more memory than scoring.
        "score_adds_mb": peak_mb - loaded_mb,
    }


if __name__ == "__main__":
    print(json.dumps(catalog(int(sys.argv[1]))))
