"""Where the files of a pretrained model come from, and what is said when they cannot be had."""

import hashlib
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from cllm4rec.errors import ConfigError
from cllm4rec.storage import hub

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of a machine with some/model: small files and weights, as the hub's client stores them."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "blobs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        content = name.encode()
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)
    return snapshot


@pytest.fixture
def no_network(monkeypatch):
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)


def hub_says(monkeypatch, error: Exception) -> None:
    def answer(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)


@pytest.mark.usefixtures("no_network")
def test_a_filled_cache_is_used_without_asking_the_network(cache):
    for folder in (hub.tokenizer_folder, hub.config_folder, hub.weights_folder):
        assert Path(folder("some/model", None)) == cache
    expected = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("config.json", "model.safetensors")}
    assert hub.weights_digests("some/model", None) == expected


@pytest.mark.usefixtures("no_network")
def test_a_file_in_the_cache_is_read_and_must_have_the_digest_in_its_name(cache):
    blob = (cache / "model.safetensors").resolve()
    assert hub.weights_digests("some/model", None)["model.safetensors"] == blob.name
    blob.write_bytes(b"another content under the same name")
    with pytest.raises(
        ConfigError, match=r"model\.safetensors of the backbone 'some/model' is damaged .* remove /.*/blobs/"
    ):
        hub.weights_digests("some/model", None)


def test_digests_of_a_folder_are_computed(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"content")
    assert set(hub.weights_digests(str(tmp_path), None).values()) == {hashlib.sha256(b"content").hexdigest()}


def test_an_incomplete_cache_asks_the_hub(cache, monkeypatch):
    (cache / "model.safetensors").unlink()
    hub_says(monkeypatch, OSError("no route to host"))
    assert Path(hub.tokenizer_folder("some/model", None)) == cache
    with pytest.raises(ConfigError, match="the hub does not answer"):
        hub.weights_folder("some/model", None)


RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://hub.example/some/model"))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            errors.GatedRepoError("Access to model is restricted.", response=RESPONSE),
            "accept the license .* HF_TOKEN on every",
        ),
        (
            errors.RepositoryNotFoundError("404 not found", response=RESPONSE),
            "no such model is there, or it is private",
        ),
        (errors.RevisionNotFoundError("404 revision", response=RESPONSE), "no such revision: correct model.revision"),
        (OSError("Name or service not known"), "the hub does not answer"),
    ],
)
def test_each_refusal_of_the_hub_is_one_sentence_with_its_words(error, advice, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub_says(monkeypatch, error)
    with pytest.raises(ConfigError, match=advice) as refused:
        hub.weights_folder("some/model", None)
    assert "some/model" in str(refused.value)
    assert str(error).split()[0] in str(refused.value)
    assert "\n" not in str(refused.value)
