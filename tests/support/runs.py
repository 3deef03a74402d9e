"""A config of the smallest whole run, for tests that start commands as a user does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cllm4rec.data.world import parity_world


def write_config(folder: Path, **sections: Any) -> Path:
    """Write the parity world's raw files and a config that trains one epoch per phase on them; return the config's path.

    The run's output_dir is `out` in the folder. `sections` replace or add sections of the config.
    """
    raw = folder / "raw"
    parity_world().write(str(raw))
    same = {"user": "user", "item": "item", "rating": "rating", "text": "text", "timestamp": "timestamp"}
    config = {
        "output_dir": str(folder / "out"),
        "data": {
            "interactions": {"path": str(raw / "interactions.jsonl"), "columns": same},
            "items": {"path": str(raw / "items.jsonl"), "columns": {"item": "item", "text": "text"}},
            "core": 2,
            "max_text_tokens": 24,
            "split": {"kind": "leave_one_out"},
        },
        "model": {"backbone": {"layers": 1, "width": 32, "heads": 2, "vocab_size": 300}, "max_tokens": 64},
        "backbone": {"epochs": 0},
        "pretrain": {"warmup_epochs": 1, "epochs": 1},
        "finetune": {"epochs": 1},
        "training": {"engine": "torch", "bf16": False, "micro_batch_tokens": 2048},
        "evaluate": {"bootstrap_samples": 20},
        "score": {"k": 5},
        **sections,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
