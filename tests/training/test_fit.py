"""Stages of training without a cluster: what they are made from may not change under them."""

import pytest
from support.comparisons import make_config

from cllm4rec.errors import ArtifactError
from cllm4rec.metrics.protocol import Validation
from cllm4rec.storage import files
from cllm4rec.storage.artifacts import write_directory
from cllm4rec.training import fit as fits


def write(uri, kind, text):
    with write_directory(uri, kind=kind, inputs={}, config={}) as draft:
        files.write_bytes(draft.path("text.txt"), text)


def test_tables_of_a_pretraining_that_was_replaced_meanwhile_are_not_joined_with_what_was_trained(
    tmp_path, monkeypatch
):
    config = make_config(tmp_path)
    for kind in ("prepared", "pretrained"):
        write(config.run.directory(kind), kind, b"before")

    def train(*_):
        write(config.run.pretrained, "pretrained", b"other tables")
        return {}

    monkeypatch.setattr(fits, "_train", train)
    with pytest.raises(
        ArtifactError, match=r"pretrained changed while finetune was at work; run the same command again"
    ):
        fits.fit_finetuned(config, Validation)
    assert not files.exists(config.run.model)
