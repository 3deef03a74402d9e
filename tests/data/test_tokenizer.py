import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cllm4rec.config import BackboneSize, ModelConfig
from cllm4rec.data import tokenizer as module
from cllm4rec.data.tokenizer import Encoder, save_tokenizer, tokenize_prompts
from cllm4rec.errors import ArtifactError, ConfigError

TEXTS = ["the strings of this guitar are fine", "a fine guitar, and a case that fits it", "strings 12 and 13 !?"] * 3
SHARED_TOKENIZERS = ("gpt2_tokenizer", "t5_tokenizer", "stories260k_llama")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    save_tokenizer(ModelConfig(backbone=BackboneSize(vocab_size=300)), iter(TEXTS), str(folder))
    return folder


@pytest.fixture(scope="module", params=["trained", *SHARED_TOKENIZERS])
def folder(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "trained":
        return trained
    source = request.getfixturevalue("shared_dir") / "weights" / request.param
    target = tmp_path_factory.mktemp(request.param)
    save_tokenizer(ModelConfig(backbone=str(source)), iter(()), str(target))
    return target


def test_no_text_produces_a_special_token_or_one_beyond_n(folder: Path) -> None:
    encoder = Encoder.load(str(folder))
    spelled = AutoTokenizer.from_pretrained(folder).all_special_tokens
    assert len(encoder.special_tokens) == len(set(spelled))

    @given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from([*spelled, "<user_5>", "item_7"])), max_size=5))
    @example(spelled)
    @settings(max_examples=100)
    def check(parts: list[str]) -> None:
        for text in ("".join(parts), " ".join(parts)):
            tokens = encoder(text)
            assert max(tokens, default=0) < encoder.num_words
            assert not set(tokens) & set(encoder.special_tokens.tolist())

    check()


def test_a_spelled_special_token_stays_in_the_text_as_ordinary_words(trained: Path) -> None:
    text = "a guitar<|endoftext|> and a case"
    assert AutoTokenizer.from_pretrained(trained).decode(Encoder.load(str(trained))(text)) == text


def test_plain_text_is_tokenized_as_transformers_does(folder: Path) -> None:
    reference = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder.load(str(folder))
    assert encoder.num_words == len(reference)
    for text in [*TEXTS, "Two lines\nand a number 42."]:
        assert encoder(text) == reference.encode(text, add_special_tokens=False)


def test_prompts_have_tokens_for_all_their_words(folder: Path) -> None:
    encoder = Encoder.load(str(folder))
    prompts = tokenize_prompts(encoder)
    assert prompts.has_interacted == encoder(" has interacted with")
    assert all(len(tokens) > 0 for tokens in vars(prompts).values())


def test_texts_are_encoded_one_by_one_in_order_and_cut(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    encoder = Encoder.load(str(trained))
    texts = ["", *TEXTS, "<|endoftext|>"]
    assert encoder.encode(texts).tolist() == [encoder(text) for text in texts]
    assert encoder.encode(texts, max_tokens=3).tolist() == [encoder(text)[:3] for text in texts]
    assert encoder.encode([]).tolist() == []


PIECES = [
    *" ".join(TEXTS).split(),
    " ",
    "    ",
    "\n",
    "<|endoftext|>",
    "</s>",
    "é" * 5,
    "東京",
    "🙂",
    "a" * 300,
    "=-=" * 40,
]


def test_the_beginning_of_a_long_text_has_the_tokens_of_the_whole(folder: Path) -> None:
    encoder = Encoder.load(str(folder))

    @given(st.lists(st.lists(st.sampled_from(PIECES), max_size=300).map(" ".join), max_size=4), st.integers(1, 40))
    @settings(max_examples=60, deadline=None)
    def check(texts: list[str], max_tokens: int) -> None:
        whole = [encoder(text)[:max_tokens] for text in texts]
        assert encoder.encode(texts, max_tokens).tolist() == whole

    check()
    # Nothing but blanks and special tokens for long, and words only then.
    late = "<|endoftext|> " * 2000 + "a guitar"
    assert encoder.encode(["fine", late], 10**5).tolist() == [encoder("fine"), encoder(late)]


def test_the_rest_of_a_long_text_costs_nothing(trained: Path) -> None:
    encoder = Encoder.load(str(trained))
    text = "a fine guitar, and a case that fits it " * 20_000

    def seconds(max_tokens: int | None) -> float:
        started = time.perf_counter()
        encoder.encode([text], max_tokens)
        return time.perf_counter() - started

    assert min(seconds(16) for _ in range(3)) < seconds(None) / 10


def test_a_trained_tokenizer_depends_on_the_texts_and_not_on_their_order(trained: Path, tmp_path: Path) -> None:
    model = ModelConfig(backbone=BackboneSize(vocab_size=300))
    save_tokenizer(model, reversed(TEXTS), str(tmp_path / "again"))
    save_tokenizer(model, TEXTS[:1], str(tmp_path / "other"))
    learned = (trained / "tokenizer.json").read_bytes()
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == learned
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() != learned
    encoder = Encoder.load(str(trained))
    assert len(encoder("guitar")) < len("guitar")
    assert encoder.special_tokens.tolist() == [0]


def test_a_backbone_that_is_not_there_is_one_sentence_and_no_long_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path / "missing"), str(tmp_path), "nobody/has-this-model"):
        with pytest.raises(ConfigError, match=r"does not exist|cannot be loaded"):
            save_tokenizer(ModelConfig(backbone=name), iter(()), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        Encoder.load(str(tmp_path))


def test_a_tokenizer_without_words_for_the_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no tokens for the words of the prompts"):
        tokenize_prompts(lambda text: [])  # type: ignore[arg-type]
