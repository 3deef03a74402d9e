"""Stages of training without a cluster: what they are made from may not change under them."""

import pytest
from comparisons import make_config

from cllm4rec import artifacts
from cllm4rec.artifacts import write_directory
from cllm4rec.errors import ArtifactError
from cllm4rec.evaluation.protocol import Validation
from cllm4rec.training import fits


def write(uri, kind, text):
    with write_directory(uri, kind=kind, inputs={}, config={}) as draft:
        artifacts.write_bytes(draft.path("text.txt"), text)


def test_tables_of_a_pretraining_that_was_replaced_meanwhile_are_not_joined_with_what_was_trained(
    tmp_path, monkeypatch
):
    config = make_config(tmp_path)
    for kind in ("prepared", "pretrained"):
        write(config.directory(kind), kind, b"before")

    def train(*_):
        write(config.directory("pretrained"), "pretrained", b"other tables")
        return {}

    monkeypatch.setattr(fits, "_train", train)
    with pytest.raises(
        ArtifactError, match=r"pretrained changed while finetune was at work; run the same command again"
    ):
        fits.fit_finetuned(config, Validation)
    assert not artifacts.exists(config.directory("model"))
