"""Training stages without a cluster: their inputs fit the config and may not change during a run."""

import shutil

import pytest
from support.comparisons import make_config
from support.directories import write_prepared, write_random_model

from cllm4rec.errors import ArtifactError
from cllm4rec.storage import files
from cllm4rec.storage.artifacts import read_manifest, write_directory
from cllm4rec.training.fit import finetune


def write_pretrained(config, source) -> None:
    with write_directory(config.run.pretrained, kind="pretrained", inputs={}, config={}) as draft:
        for name in read_manifest(str(source), "model").files:
            files.copy_file(files.join(str(source), name), draft.path(name))


def test_finetuning_fails_if_the_pretrained_tables_change_during_the_run(tmp_path):
    config = make_config(tmp_path)
    write_prepared(tmp_path / "prepared")
    first = write_random_model(tmp_path, config.run.prepared, seed=0)
    write_pretrained(config, first)
    shutil.rmtree(first)

    def trainer(job, run_dir):
        replacement = write_random_model(tmp_path / "other", config.run.prepared, seed=1)
        write_pretrained(config, replacement)
        return {}

    with pytest.raises(ArtifactError, match=r"pretrained changed during finetuning; run the same command again"):
        finetune(config, force=False, trainer=trainer)
    assert not files.exists(config.run.model)


def test_finetuning_refuses_pretrained_tables_of_another_width(tmp_path):
    config = make_config(tmp_path)
    write_prepared(tmp_path / "prepared")
    write_pretrained(config, write_random_model(tmp_path, config.run.prepared, seed=0, id_width=8))
    with pytest.raises(
        ArtifactError, match=r"trained with model.id_width 8, but the config has null; run the pretrain"
    ):
        finetune(config, force=False, trainer=lambda job, run_dir: {})
