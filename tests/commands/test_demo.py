"""The demo writes its world once, where its config reads it."""

import argparse

from cllm4rec.commands import demo
from cllm4rec.config import parse_config
from cllm4rec.storage import files


def fails(error):
    def job(*_):
        raise error

    return job


def test_the_demo_writes_its_world_where_its_config_reads_it(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    monkeypatch.setattr(demo.pipeline, "run", lambda config, args: {"ran": True})
    monkeypatch.setattr(demo, "sample_world", lambda folder: files.write_bytes(f"{folder}/reviews.json.gz", b"x"))
    config = parse_config(
        {"output_dir": str(tmp_path / "elsewhere"), "data": {"interactions": {"path": f"{raw}/reviews.json.gz"}}}
    )
    assert demo.run(config, argparse.Namespace()) == {"ran": True}
    assert (raw / "reviews.json.gz").exists()
    monkeypatch.setattr(demo, "sample_world", fails(AssertionError("written twice")))
    demo.run(config, argparse.Namespace())
