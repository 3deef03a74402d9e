"""The config of a comparison on the parity world, which several test files run."""

from __future__ import annotations

from parity import MAX_TOKENS

from cllm4rec.config import parse_config

NUM_WORDS = 300


def make_config(tmp_path, **compare):
    return parse_config(
        {
            "output_dir": str(tmp_path),
            "data": {
                "interactions": {"path": "none.jsonl", "columns": {"user": "user", "item": "item"}},
                "split": {"kind": "leave_one_out"},
                "max_text_tokens": 24,
            },
            "model": {
                "backbone": {"layers": 2, "width": 32, "heads": 4, "vocab_size": NUM_WORDS},
                "max_tokens": MAX_TOKENS,
                "table_std": 0.1,
            },
            "backbone": {"epochs": 1},
            "pretrain": {"warmup_epochs": 1, "epochs": 2, "learning_rate": 1e-2},
            "finetune": {
                "epochs": 20, "learning_rate": 3e-2, "mask_fraction": [0.1, 0.9], "target": "all", "user_dropout": 0.5,
                "lambda_c": 0.0, "patience": 20,
            },
            "training": {"engine": "torch", "bf16": False, "micro_batch_tokens": 8 * MAX_TOKENS},
            "evaluate": {"bootstrap_samples": 50},
            "compare": {"trials": 1, "seeds": [0, 1], **compare},
        }
    )  # fmt: skip
