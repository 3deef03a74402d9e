"""Changes each setting of the schema in turn and checks which stages become stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cllm4rec.config import Config, parse_config
from cllm4rec.data.prepare import prepare_inputs
from cllm4rec.evaluation.stage import evaluate_inputs
from cllm4rec.nightly.plan import plan_score
from cllm4rec.staleness import EXCLUDED, SECTIONS
from cllm4rec.storage.artifacts import read_manifest, write_directory
from cllm4rec.storage.files import write_bytes
from cllm4rec.training.fit import backbone_inputs, finetune_inputs, pretrain_inputs

TRAINING = {"backbone", "pretrain", "finetune"}
EXPECTED: dict[str, set[str]] = {
    # The longest matching prefix of a setting applies.
    "output_dir": set(),
    "seed": TRAINING | {"evaluate"},
    "run_date": {"score"},
    "data": {"prepare"},
    "model.backbone": {"backbone"},
    "model.backbone.vocab_size": {"prepare", "backbone"},
    "model.revision": {"backbone"},
    "model.store_backbone": {"backbone"},
    "model.max_tokens": TRAINING,
    "model.id_width": {"pretrain", "finetune"},
    "model.history": {"pretrain", "finetune"},
    "model.table_std": {"pretrain"},
    "model.table_init": {"pretrain"},
    "model.temperature": {"pretrain", "finetune"},
    "backbone": {"backbone"},
    "backbone.adapter": {"backbone", "pretrain"},  # `trained_in` of the changed value names pretrain
    "pretrain": {"pretrain"},
    "finetune": {"finetune"},
    "training": TRAINING,
    "training.checkpoint_every_epochs": set(),
    "training.tensorboard": set(),
    "training.gradient_checkpointing": set(),
    "training.validate_every_epochs": {"pretrain", "finetune"},
    "training.cpu_offload": set(),
    "evaluate": {"evaluate"},
    "compare": set(),
    "coldstart": set(),
    "score": {"score"},
    "score.num_actors": set(),
    "score.batch_users": set(),
    "nightly": set(),  # settings of a nightly run, not of `score`
    "extend": set(),
    "promote": set(),
    "serve": set(),
    "cluster": set(),
}
SPECIAL: dict[str, Any] = {
    # Valid values of settings for which `_another` would give an invalid one.
    "data.interactions.path": ["more.jsonl", "interactions.jsonl"],
    "data.interactions.format": "amazon2014",
    "data.interactions.columns.text": "review",
    "data.interactions.delimiter": ";",
    "data.interactions.encoding": "latin-1",
    "data.interactions.decimal": ",",
    "data.interactions.time_unit": "ms",
    "data.interactions.time_format": "%d/%m/%Y",
    "data.items": {"path": "items.jsonl", "columns": {"item": "i", "text": "t"}},
    "data.users": {"path": "items.jsonl", "columns": {"user": "i", "text": "t"}},
    "data.expected": {"users": 3, "items": 3, "interactions": 9},
    "data.min_rating": None,
    "run_date": "2026-01-02",
    "backbone.adapter": {"rank": 4, "trained_in": ["pretrain"]},
    "model.store_backbone": "copy",
    "model.backbone.heads": 2,
    "model.backbone.width": 256,
    "model.id_width": 64,
    "model.history": "residual",
    "model.table_std": 0.5,
    "finetune.mask_fraction": [0.1, 0.3],
    "finetune.epochs": 5,
    "pretrain.epochs": 5,
    "pretrain.text_fraction": 0.5,
    "training.engine": "deepspeed",
    "training.global_batch_tokens": 8192,
    "training.micro_batch_tokens": 8192,
    "training.gradient_clipping": 1.0,
    "training.sampled_items": 100,
    "training.validate_every_epochs": 2,
    "evaluate.published": {"source": "a paper", "results": {"ease": {"recall@20": 0.5}}},
    "compare.sweep_seeds": [0],
    "compare.methods": ["ease"],
    "compare.seeds": [0, 1],
    "compare.sweeps": [{"name": "x", "settings": ["seed"], "values": [1, 2]}],
    "score.rules.max_per_category": None,
    "nightly.events": {"path": "interactions.jsonl"},
    "extend.items": {"path": "items.jsonl", "columns": {"item": "i", "text": "t"}},
    "extend.reader": "words",
    "extend.layers": [1.0],
    "coldstart.seeds": [5],
    "promote.metric": "ndcg@100",
    "serve.host": "0.0.0.0",
    "serve.min_replicas": 2,
    "cluster.threads_per_worker": 3,
    "cluster.start_timeout_s": 60.0,
}
BASE_SETTINGS: dict[str, Any] = {
    "serve": {"max_replicas": 4},
    "training": {"engine": "torch", "micro_batch_tokens": 4096},
}
NEEDS: dict[str, dict[str, Any]] = {"training.cpu_offload": {"training": {"engine": "deepspeed", "zero_stage": 1}}}
"""Setting → other settings that it is valid with."""
RULE_FILES = {
    "deny": ("item_id", "x"),
    "allow": ("item_id", "x"),
    "categories": ("item_id,category", "x,c"),
    "availability": ("item_id,first_date,last_date", "x,2026-01-01,"),
    "boost": ("item_id,boost", "x,1.0"),
}


def leaves(section: BaseModel, prefix: str = "") -> list[str]:
    found = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        nested = isinstance(value, BaseModel)
        found += leaves(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return found


def raw_config(folder: Path) -> dict[str, Any]:
    columns = {"user": "u", "item": "i", "rating": "r"}
    return {
        "output_dir": str(folder / "run"),
        "run_date": "2026-01-01",
        # csv, because only then there is a delimiter
        "data": {"interactions": {"path": str(folder / "interactions.jsonl"), "format": "csv", "columns": columns}},
        **BASE_SETTINGS,
        "score": {"rules": {"categories": str(folder / "categories.csv"), "max_per_category": 2}},
    }


def changed(config: Config, key: str, folder: Path) -> Config:
    raw = config.model_dump(mode="json")
    *sections, last = key.split(".")
    target = raw
    for section in sections:
        target = target[section]
    target[last] = _another(key, target[last], folder)
    return parse_config(raw)


def _another(key: str, value: Any, folder: Path) -> Any:
    if key in SPECIAL:
        return _below(SPECIAL[key], folder)
    if key.startswith("score.rules.") and key.rpartition(".")[2] in RULE_FILES:
        return str(folder / f"other_{key.rpartition('.')[2]}.csv")
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    literal = {
        "random": "temporal", "gpt2": "llama", "texts": "noise", "heldout": "all", "train+validation": "train",
        "train": "train+validation", "main": "all", "texts_only": "texts",
    }  # fmt: skip
    return literal.get(value, "another" if value is None or isinstance(value, str) else value)


def _below(value: Any, folder: Path) -> Any:
    """Replace file names by paths in the folder of the test."""
    if isinstance(value, str) and value.endswith(".jsonl"):
        return str(folder / value)
    if isinstance(value, list):
        return [_below(inner, folder) for inner in value]
    return {name: _below(inner, folder) for name, inner in value.items()} if isinstance(value, dict) else value


def inputs(config: Config) -> dict[str, Any]:
    return {
        "prepare": prepare_inputs(config),
        "backbone": backbone_inputs(config),
        "pretrain": pretrain_inputs(config),
        "finetune": finetune_inputs(config),
        "evaluate": evaluate_inputs(config),
        "score": plan_score(config).run_id,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with finished directories of all stages, as far as the input digests need them."""
    folder = tmp_path_factory.mktemp("staleness")
    for name in ("interactions", "more", "items"):
        (folder / f"{name}.jsonl").write_text(f'{{"u": "{name}", "i": "i", "r": 5}}\n')
    for rule, (header, row) in RULE_FILES.items():
        (folder / f"{rule}.csv").write_text(f"{header}\n{row}\n")
        (folder / f"other_{rule}.csv").write_text(f"{header}\n{row.replace('x', 'y')}\n")
    digests: dict[str, str] = {}
    for kind in ("prepared", "backbone", "pretrained", "model"):
        uri = str(folder / "run" / kind)
        with write_directory(uri, kind=kind, inputs=digests, config={}) as draft:
            write_bytes(draft.path("content"), kind.encode())
            draft.counts["users"] = 1
        if kind == "prepared":
            digests = {"prepared": read_manifest(uri, kind).digest}
    return folder


LEAVES = [key for key in leaves(parse_config(raw_config(Path("x")))) if key != "output_dir"]


def expected(key: str) -> set[str]:
    prefixes = [prefix for prefix in EXPECTED if key == prefix or key.startswith(f"{prefix}.")]
    assert prefixes, f"{key} is new: add to EXPECTED which stages become stale when it changes"
    return EXPECTED[max(prefixes, key=len)]


@pytest.mark.parametrize("key", LEAVES)
def test_a_changed_setting_makes_exactly_these_stages_stale(folder: Path, key: str) -> None:
    before = parse_config(raw_config(folder) | NEEDS.get(key, {}))
    after = changed(before, key, folder)
    assert after != before, f"{key} was not changed; add another value to SPECIAL"
    old, new = inputs(before), inputs(after)
    assert {stage for stage in old if old[stage] != new[stage]} == expected(key)


def test_exclusions_name_settings_that_exist() -> None:
    config = parse_config(raw_config(Path("x")))
    keys = set(leaves(config))
    for stage, excluded in EXCLUDED.items():
        for key in excluded:
            assert any(leaf == key or leaf.startswith(f"{key}.") for leaf in keys), key
            assert key.partition(".")[0] in SECTIONS[stage], f"{key} is in no section of {stage}"
