"""A saved model loads unchanged. Damaged, foreign and executable files are refused."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.directories import write_prepared, write_random_model

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.prepared import load_histories
from cllm4rec.errors import ArtifactError
from cllm4rec.model.backbone_files import load_backbone
from cllm4rec.model.cllm4rec import TABLES, CLLM4Rec
from cllm4rec.model.ranker import Ranker
from cllm4rec.model.saved_model import SavedModel, load_tables
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.storage import files
from cllm4rec.storage.artifacts import MANIFEST, read_manifest
from cllm4rec.storage.files import digest_of_file


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return Path(write_random_model(folder, write_prepared(folder / "prepared"), seed=0))


@pytest.fixture
def model(written, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def seal(model: Path) -> None:
    """Rewrite the digests in the manifest for the present files, as an attacker would."""
    raw = json.loads((model / MANIFEST).read_text())
    names = [name for name in files.list_files(str(model)) if name != MANIFEST]
    raw["files"] = {name: {"sha256": digest_of_file(str(model / name)), "bytes": 0} for name in names}
    (model / MANIFEST).write_text(json.dumps(raw))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_a_model_comes_back_with_its_tables_and_catalog(written):
    stored = SavedModel.from_pretrained(str(written))
    tables = load_file(written / "tables.safetensors")
    assert all(torch.equal(table.data, tables[name]) for name, table in stored.ranker.model.tables().items())
    assert not any(weight.requires_grad for weight in stored.ranker.model.parameters())
    assert (stored.catalog.num_users, stored.catalog.num_items) == (40, 20)
    assert (stored.ranker.prompt, stored.ranker.max_tokens, stored.prompt_tokens.num_words) == (
        "recommendation",
        64,
        300,
    )
    assert Scorer.load(str(written)).model_version == read_manifest(str(written), "model").digest[:12]
    assert set(load_tables(str(written), "model")) == set(tables)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    return Path(write_random_model(folder, write_prepared(folder / "prepared"), seed=0, id_width=8))


def test_a_model_with_narrow_tables_comes_back_with_the_same_lists(narrow):
    """Compared with a model made here, whose seeds are those of the written one."""
    stored = SavedModel.from_pretrained(str(narrow))
    assert stored.ranker.model.collaborative_users.shape == (40, 8)
    backbone = load_backbone(str(narrow / "backbone"), 64)
    made = CLLM4Rec(backbone, stored.ranker.token_space, std=1.0, id_width=8).eval()
    made.train_only(())
    made.compute_in(torch.float32)
    query = (np.arange(40), training_items(narrow), 7)
    expected = Scorer(Ranker(made, stored.prompt_tokens.prompts, 64), stored.catalog, "").top_k(*query)
    found = Scorer.load(str(narrow)).top_k(*query)
    assert all(np.array_equal(here, there) for here, there in zip(found, expected, strict=True))
    assert len(np.unique(found[0][:, 0])) > 1


@pytest.mark.parametrize("name", ["input_projection", "query_projection"])
def test_a_model_without_its_projections_is_refused(narrow, tmp_path, name):
    model = Path(shutil.copytree(narrow, tmp_path / "model"))
    tables = load_file(model / "tables.safetensors")
    del tables[name]
    save_file(tables, model / "tables.safetensors")
    seal(model)
    with pytest.raises(ArtifactError, match=rf"no {name} of shape"):
        SavedModel.from_pretrained(str(model))


def test_a_model_without_projections_has_the_files_of_earlier_versions(written):
    assert "id_width" not in json.loads((written / "model.json").read_text())
    assert sorted(load_file(written / "tables.safetensors")) == sorted(TABLES.values())


def test_the_temperature_of_training_divides_the_scores(written, model):
    metadata = json.loads((model / "model.json").read_text())
    assert metadata["temperature"] == 1.0
    (model / "model.json").write_text(json.dumps(metadata | {"temperature": 4.0}))
    seal(model)
    query = (np.arange(5), Ragged.from_lists([[0], [1], [2, 3], [], [4]]), 3)
    (items, scores), (same_items, warm_scores) = (
        Scorer.load(str(directory)).top_k(*query) for directory in (written, model)
    )
    assert np.array_equal(items, same_items)
    assert np.allclose(warm_scores, scores / 4.0)


def test_a_model_is_loaded_from_any_file_system(written):
    uri = "memory://store/model"
    for name in files.list_files(str(written)):
        files.copy_file(str(written / name), files.join(uri, name))
    users, histories = np.arange(3), training_items(written).take(np.arange(3))
    for here, there in zip(
        Scorer.load(str(written)).top_k(users, histories, 5), Scorer.load(uri).top_k(users, histories, 5), strict=True
    ):
        assert np.array_equal(here, there)


def test_a_loaded_model_does_not_change_with_its_files(model):
    """Tables are read through a memory map, but copied before use: overwriting the file in place has no effect."""
    scorer = Scorer.load(str(model))
    query = (np.arange(5), Ragged.from_lists([[0], [1], [2, 3], [], [4]]), 3)
    before = scorer.top_k(*query)
    with (model / "tables.safetensors").open("r+b") as stream:
        size = stream.seek(0, 2)
        stream.seek(size // 2)
        stream.write(bytes(size - size // 2))
        stream.seek(2048)
        stream.write(bytes(size // 2 - 2048))
    assert all(np.array_equal(old, new) for old, new in zip(before, scorer.top_k(*query), strict=True))


def training_items(written):
    return load_histories(str(written.parent / "prepared")).train


@pytest.mark.parametrize(
    "name", ["tables.safetensors", "model.json", "items.parquet", "prompts.json", "backbone/model.safetensors"]
)
def test_a_flipped_bit_anywhere_is_refused(model, name):
    content = bytearray((model / name).read_bytes())
    content[len(content) // 2] ^= 1
    (model / name).write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=rf"{name} is damaged \(sha256 differs\)"):
        SavedModel.from_pretrained(str(model))


def test_a_flipped_bit_in_the_tables_does_not_reach_the_next_stage(model):
    content = bytearray((model / "tables.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "tables.safetensors").write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="is damaged"):
        load_tables(str(model), "model")


def test_a_missing_file_is_refused(model):
    (model / "users.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"users\.parquet is missing"):
        SavedModel.from_pretrained(str(model))


def test_a_foreign_catalog_is_refused(model):
    """Even if the manifest matches: the catalog has users for which the tables have no rows."""
    Catalog([f"u{user}" for user in range(41)], [f"i{item}" for item in range(20)]).save(str(model))
    with pytest.raises(ArtifactError, match=r"is damaged"):
        SavedModel.from_pretrained(str(model))
    seal(model)
    with pytest.raises(ArtifactError, match=r"was trained for .* \(300, 40, 20\), but its catalog has \(300, 41, 20\)"):
        SavedModel.from_pretrained(str(model))


def test_tables_of_another_shape_are_refused(model):
    tables = load_file(model / "tables.safetensors")
    save_file({name: table[:, :16].contiguous() for name, table in tables.items()}, model / "tables.safetensors")
    seal(model)
    with pytest.raises(ArtifactError, match=r"no collaborative_users of shape \(40, 32\)"):
        SavedModel.from_pretrained(str(model))


def test_metadata_of_another_version_is_refused(model):
    (model / "model.json").write_text("{}")
    seal(model)
    with pytest.raises(ArtifactError, match=r"model\.json has other fields than this version writes"):
        SavedModel.from_pretrained(str(model))


@pytest.mark.parametrize("load", [SavedModel.from_pretrained, lambda directory: load_tables(directory, "model")])
def test_a_pickle_instead_of_the_tables_is_never_loaded(model, tmp_path, load):
    (model / "tables.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "trace")))
    seal(model)
    with pytest.raises(ArtifactError, match="is not a safetensors file"):
        load(str(model))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("replaces_safetensors", [True, False])
def test_a_pickle_in_the_backbone_is_never_loaded(model, tmp_path, replaces_safetensors):
    torch.save(Payload(tmp_path / "trace"), model / "backbone" / "pytorch_model.bin")
    if replaces_safetensors:
        (model / "backbone" / "model.safetensors").unlink()
    seal(model)
    with pytest.raises(ArtifactError, match=r"pytorch_model\.bin is neither safetensors nor JSON"):
        SavedModel.from_pretrained(str(model))
    assert not (tmp_path / "trace").exists()


def test_a_pretrained_directory_is_refused_as_a_model(model):
    raw = json.loads((model / MANIFEST).read_text()) | {"kind": "pretrained"}
    (model / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="is a pretrained directory, but a model directory is needed"):
        SavedModel.from_pretrained(str(model))
