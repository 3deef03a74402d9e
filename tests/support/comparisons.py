"""A comparison on the parity world, shared by several test files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from cllm4rec.config import parse_config
from cllm4rec.data.prepare import prepare_inputs
from cllm4rec.data.prepared import PromptTokens
from cllm4rec.data.tokenizer import save_tokenizer
from cllm4rec.experiments.comparison.language import run_backbone
from cllm4rec.experiments.comparison.trial import MethodRun, of_split, run_method
from cllm4rec.storage.files import join, write_table
from support.directories import write_prepared
from support.parity import MAX_TOKENS, parity

NUM_WORDS = 300


def make_config(tmp_path, **compare):
    return parse_config(
        {
            "output_dir": str(tmp_path),
            "data": {
                "interactions": {"path": f"{tmp_path}/interactions.jsonl", "columns": {"user": "user", "item": "item"}},
                "split": {"kind": "leave_one_out"},
                "max_text_tokens": 24,
            },
            "model": {
                "backbone": {"layers": 2, "width": 32, "heads": 4, "vocab_size": NUM_WORDS},
                "max_tokens": MAX_TOKENS,
                "table_std": 0.1,
            },
            "backbone": {"epochs": 1},
            "pretrain": {"warmup_epochs": 1, "epochs": 2, "learning_rate": 1e-2, "text_fraction": 1.0},
            "finetune": {
                "epochs": 20, "learning_rate": 3e-2, "mask_fraction": [0.1, 0.9], "target": "all", "user_dropout": 0.5,
                "lambda_c": 0.0, "patience": 20,
            },
            "training": {"engine": "torch", "bf16": False, "micro_batch_tokens": 8 * MAX_TOKENS},
            "evaluate": {"bootstrap_samples": 50},
            "compare": {"trials": 1, "seeds": [0, 1], **compare},
        }
    )  # fmt: skip


def prepared(config):
    """Write the prepared parity world and its language model for each seed; the split is the same for all seeds."""
    torch.set_num_threads(1)
    parity().world.write(config.output_dir)
    for seed in config.compare.seeds:
        split = of_split(config, seed)
        directory = write_prepared(Path(split.run.prepared), inputs=prepare_inputs(split))
        PromptTokens(parity().prompts, NUM_WORDS).save(directory)
        token_space = dataclasses.replace(parity().token_space, num_words=NUM_WORDS)
        shifted = parity().documents
        move = NUM_WORDS - parity().token_space.num_words

        def moved(ragged, move=move):
            ids = ragged.values
            return dataclasses.replace(ragged, values=np.where(ids >= parity().token_space.num_words, ids + move, ids))

        documents = dataclasses.replace(shifted, prompt=moved(shifted.prompt), main=moved(shifted.main))
        assert token_space.is_item(documents.main.values).any()
        write_table(documents.to_arrow(), join(directory, "documents", "bucket-00000.parquet"))
        save_tokenizer(config.model, parity().world.catalog.item_texts, join(directory, "tokenizer"))
        run_backbone(split)
    return config


def with_compare(config, **changes):
    return parse_config(config.model_dump() | {"compare": config.compare.model_dump() | changes})


def run_methods(config, names):
    return [run_method(MethodRun(of_split(config, seed), name)) for name in names for seed in config.compare.seeds]
