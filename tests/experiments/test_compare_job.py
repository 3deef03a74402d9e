"""The command `compare` on a real Ray, from raw files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from support.comparisons import make_config
from support.parity import parity

from cllm4rec.commands import compare
from cllm4rec.config import load_config, parse_config

pytestmark = pytest.mark.ray


def run(config, *, quick: bool = False):
    return Path(compare.run(config, argparse.Namespace(quick=quick, force=False))["directory"])


def test_the_job_runs_on_ray_from_raw_files_and_again_does_nothing(tmp_path, ray_local, capsys):
    parity().world.write(str(tmp_path))
    columns = {"user": "user", "item": "item", "rating": "rating", "text": "text", "timestamp": "timestamp"}
    sweeps = [{"name": "width", "settings": ["model.backbone.width"], "values": [16, 32]}]
    methods = ["popularity", "ease", "cllm4rec"]
    raw = make_config(tmp_path / "run", methods=methods, sweeps=sweeps).model_dump(mode="json")
    raw["data"] |= {
        "interactions": {"path": str(tmp_path / "interactions.jsonl"), "columns": columns},
        "items": {"path": str(tmp_path / "items.jsonl"), "columns": {"item": "item", "text": "text"}},
        "core": 1,
        "expected": {"users": 40, "items": 20, "interactions": 400},
    }
    given = parse_config(raw)
    metrics = json.loads((run(given) / "metrics.json").read_text())
    assert metrics["results"]["cllm4rec"]["recall@10"]["mean"] == 1.0
    assert [point["value"] for point in metrics["sensitivity"]["width"]] == [16, 32]
    capsys.readouterr()
    run(given)
    assert "8 of 8 method runs are finished" in capsys.readouterr().out


def test_the_quick_form_on_real_data_ranks_better_than_popularity(shared_dir, tmp_path, ray_local):
    raw = shared_dir / "data" / "amazon_musical_instruments" / "reviews_Musical_Instruments_5.json.gz"
    methods = ["cllm4rec", "sasrec", "popularity"]
    settings = [f"output_dir={tmp_path}", f"data.interactions.path={raw}", f"compare.methods={methods}"]
    config = load_config("compare_musical_instruments", settings)
    directory = run(config, quick=True)
    metrics = json.loads((directory / "metrics.json").read_text())
    reached = {name: found["recall@20"]["mean"] for name, found in metrics["results"].items()}
    assert set(reached) == set(methods)
    assert reached["cllm4rec"] > reached["popularity"] + 0.02
    assert reached["cllm4rec"] > reached["sasrec"] + 0.02
    assert "526 users" in (directory / "report.md").read_text()
