"""The planned memory: parts by arithmetic, and the total against a measured peak."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.families import tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig

from cllm4rec.commands.cli import main
from cllm4rec.config import Config, parse_config
from cllm4rec.errors import ResourceError
from cllm4rec.training.memory import MemoryPlan, Sizes, check_memory, scoring_memory, training_memory

SIZES = Sizes(users=1000, items=200, words=128)
FLOAT32 = 4


@pytest.fixture
def stock(tmp_path: Path) -> str:
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path / "stock")
    return str(tmp_path / "stock")


def config_of(stock: str, num_workers: int = 4, **sections: dict[str, object]) -> Config:
    raw: dict[str, dict[str, object]] = {
        "data": {"interactions": {"path": "x.jsonl"}, "max_text_tokens": 24},
        "model": {"backbone": stock, "max_tokens": 48},
        "training": {"micro_batch_tokens": 256},
        "cluster": {"num_workers": num_workers},
    }
    for name, settings in sections.items():
        raw[name] = raw.get(name, {}) | settings
    return parse_config({"output_dir": "runs/x", **raw})


def test_the_parts_are_those_of_the_tables_and_of_the_weights(stock):
    plan = training_memory(config_of(stock), SIZES, "cuda").parts
    weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(stock).parameters())
    assert plan["language model"] == 2 * weights, "bfloat16"
    assert plan["ID tables"] == 2 * (1000 + 200) * 32 * FLOAT32
    assert plan["gradients of ID tables"] == 2 * 200 * 32 * FLOAT32, "rows of users have no dense gradient"
    assert plan["Adam"] == 2 * 2 * (200 + 1000 // 4) * 32 * FLOAT32, "each worker has the moments of its own users"


def test_id_width_zero_and_checkpointing_take_what_they_promise(stock):
    whole = training_memory(config_of(stock), SIZES, "cuda").parts
    narrow = training_memory(config_of(stock, model={"id_width": 8}), SIZES, "cuda").parts
    assert narrow["ID tables"] * 4 == whole["ID tables"]
    divided = training_memory(config_of(stock, training={"zero_stage": 3}), SIZES, "cuda").parts
    assert divided["ID tables"] * 4 == whole["ID tables"]
    assert divided["language model"] * 4 == whole["language model"]
    assert divided["gathered layers"] == whole["language model"], "both of its two layers"
    assert divided["gathered ID tables"] == whole["ID tables"], "a step reads them whole"
    shared = training_memory(config_of(stock, training={"zero_stage": 1}), SIZES, "cuda").parts
    items = 2 * 200 * 32 * FLOAT32
    assert shared["DeepSpeed's buffer of gradients"] == items, "no more than is trained"
    assert shared["DeepSpeed's copies of its share"] * 4 == items
    many = training_memory(config_of(stock, training={"zero_stage": 1}), Sizes(1000, 10**7, 128), "cuda").parts
    assert many["DeepSpeed's buffer of gradients"] == 50_000_000 * FLOAT32
    for device_part in ("best epoch and checkpoint", "ID tables"):
        whole_on_cpu, divided_on_cpu = (
            training_memory(config_of(stock, training={"zero_stage": stage}), SIZES, "cpu").parts[device_part]
            for stage in (2, 3)
        )
        assert divided_on_cpu * 4 == whole_on_cpu
    on_host = training_memory(config_of(stock, training={"zero_stage": 3, "cpu_offload": True}), SIZES, "cuda").parts
    assert not on_host.keys() & {"language model", "ID tables", "Adam", "DeepSpeed's copies of its share"}
    assert on_host["gathered layers"] == divided["gathered layers"]
    part = "activations of 256 tokens"
    few = training_memory(config_of(stock, training={"gradient_checkpointing": True}), SIZES, "cuda").parts
    assert few[part] < whole[part] / 3
    more = training_memory(config_of(stock, training={"micro_batch_tokens": 512}), SIZES, "cuda").parts
    assert more["activations of 512 tokens"] == pytest.approx(2 * whole[part], rel=0.05)
    adapted = config_of(stock, backbone={"adapter": {"rank": 2, "trained_in": ["pretrain"]}})
    assert training_memory(adapted, SIZES, "cuda").parts["adapter, with gradients and Adam"] > 0
    assert scoring_memory(adapted, SIZES, "cuda").parts["ID tables"] == whole["ID tables"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_built_models_have_a_plan(architecture):
    config = config_of("x", model={"backbone": {"architecture": architecture, "width": 32, "heads": 4}})
    assert training_memory(config, SIZES, "cpu").parts["activations of 256 tokens"] > 256 * 32 * FLOAT32


def test_too_little_memory_is_said_with_the_largest_part_and_a_remedy():
    plan = MemoryPlan({"language model": 3 << 30, "ID tables": 5 << 30})
    check_memory(plan, 8 << 30, "a training worker")
    with pytest.raises(
        ResourceError,
        match=r"a training worker needs about 8.0 GiB and 2.0 GiB are free; .* ID tables with 5.0 .*id_width",
    ):
        check_memory(plan, 2 << 30, "a training worker")


def test_the_command_prints_the_parts_for_each_zero_stage(stock, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(f"output_dir: {tmp_path / 'run'}\ndata: {{interactions: {{path: x.jsonl}}}}\n")
    arguments = [
        "plan",
        "--config",
        str(path),
        f"model.backbone={stock}",
        "model.max_tokens=48",
        "data.max_text_tokens=24",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--users", "1000", "--items", "200"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "1,000 users, 200 items" in printed
    assert {"ZeRO-0", "ZeRO-3", "scoring"} <= set(printed.split())
    assert "language model" in printed
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "give --users and --items" in capsys.readouterr().err


SHAPES = {
    "135 million": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "1 billion": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8 billion": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARIES = {"135 million": 49152, "1 billion": 128256, "8 billion": 128256}
KEY_HEADS = {"135 million": 3, "1 billion": 8, "8 billion": 8}


def page_table(folder: Path) -> str:
    """The table of docs/stock-models.md: GiB of a GPU worker of 8 by model, users and ZeRO stage."""
    rows = []
    for name, shape in SHAPES.items():
        words = VOCABULARIES[name]
        LlamaConfig(
            **shape, vocab_size=words, num_key_value_heads=KEY_HEADS[name], tie_word_embeddings=name != "8 billion"
        ).save_pretrained(folder / name)
        for users in (100_000, 10_000_000):
            for id_width in (None, 256):
                totals = [
                    training_memory(
                        config_of(
                            str(folder / name),
                            8,
                            model={"id_width": id_width},
                            training={"micro_batch_tokens": 8192, "gradient_checkpointing": True, "zero_stage": stage},
                        ),
                        Sizes(users, 100_000, words),
                        "cuda",
                    ).total
                    for stage in range(4)
                ]
                cells = [name, f"{users:,}", str(id_width or "null"), *(f"{total / 2**30:.1f}" for total in totals)]
                rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_page_has_the_figures_of_the_function(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "stock-models.md").read_text()
    assert page_table(tmp_path) in page, f"replace the rows of the table by\n{page_table(tmp_path)}"


MEASURE = Path(__file__).parent.parent / "support" / "peak_memory.py"


@pytest.mark.ray
def test_a_model_of_a_billion_parameters_is_stepped_within_its_plan(tmp_path):
    """Weights in bfloat16 shards on disk, loaded, stepped, copied for a checkpoint and used for validation."""
    shape = LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "billion", max_shard_size="600MB")
    assert len(list((tmp_path / "billion").glob("*.safetensors"))) > 2
    del model
    found = subprocess.run(
        [sys.executable, str(MEASURE), str(tmp_path / "billion")],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    peak, plan = json.loads(found.stdout.splitlines()[-1])
    assert plan / 2 < peak < 1.15 * plan
