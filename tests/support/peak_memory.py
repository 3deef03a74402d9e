"""Train a step around a stock model, copy the checkpoint and validate: prints [peak, planned] bytes as JSON.

python tests/support/peak_memory.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import parse_config
from cllm4rec.data.documents import Prompts
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.cllm4rec import TABLES, CLLM4Rec
from cllm4rec.model.packing import Packer
from cllm4rec.model.precision import precision_on
from cllm4rec.model.ranker import Ranker
from cllm4rec.model.stock_backbone import pretrained_backbone
from cllm4rec.training.engine import make_engine
from cllm4rec.training.memory import Sizes, training_memory

MAX_TOKENS, SLOTS, USERS, ITEMS = 64, 256, 2000, 5000


def main(folder: str) -> None:
    config = parse_config(
        {
            "output_dir": "runs/x",
            "data": {"interactions": {"path": "x.jsonl"}, "max_text_tokens": 32},
            "model": {"backbone": folder, "max_tokens": MAX_TOKENS},
            "training": {"micro_batch_tokens": SLOTS, "engine": "torch"},
        }
    )
    precision = precision_on("cpu", bf16=True)
    backbone = pretrained_backbone(folder, None, MAX_TOKENS, precision)
    space = TokenSpace(len(backbone.word_embeddings), USERS, ITEMS)
    plan = training_memory(config, Sizes(USERS, ITEMS, space.num_words), "cpu")
    model = CLLM4Rec(backbone, space, std=0.1)
    model.train_only(TABLES.values())
    model.compute_in(precision)
    rng = np.random.default_rng(0)
    users = np.arange(SLOTS // 32)
    prompts = Prompts.tokenize(lambda text: [len(text) % 100 + 5])
    histories = Ragged.from_lists([rng.integers(0, ITEMS, 24) for _ in users])
    batch = Packer(space, SLOTS, MAX_TOKENS).layout(prompts.interactions(space, users, histories))
    engine = make_engine(model, config.training, 1e-3, 1, users)
    engine.backward(engine.forward(batch_to_device(batch, torch.device("cpu")), 1.0).total / len(users))
    engine.step()
    best, state = engine.weights(), engine.state()
    Ranker(model, prompts, MAX_TOKENS, "interactions").top_k(users, histories, histories, 10)
    assert best.keys() <= state.keys()
    print(json.dumps([_peak(), plan.total]))


def _peak() -> int:
    """The largest resident size so far, in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    main(sys.argv[1])
