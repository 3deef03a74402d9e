"""A GGUF file becomes a folder with the same model and the same tokenizer."""

import json

import pytest
import torch
from support.gguf_files import SPECIAL, tiny_llama, words, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from cllm4rec.data.tokenizer import Encoder
from cllm4rec.errors import DataError
from cllm4rec.model.gguf import write_llama

pytest.importorskip("gguf", reason='gguf is not installed; pip install -e ".[dev]"')


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted")
    write_gguf(model, target / "model.gguf")
    write_llama(str(target / "model.gguf"), str(target), start_token=0)
    return target


def test_a_converted_model_has_the_same_logits_bit_for_bit(model, folder):
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(converted(tokens).logits, model(tokens).logits)


def test_the_weights_are_bfloat16_and_readable_by_everyone(folder):
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert {weight.dtype for weight in converted.parameters()} == {torch.bfloat16}
    assert (
        len({path.stat().st_mode for path in folder.glob("*.json")} | {(folder / "model.safetensors").stat().st_mode})
        == 1
    )


def test_quantized_weights_are_near_the_original(model, folder, tmp_path):
    write_gguf(model, tmp_path / "model.gguf", "Q4_1")
    write_llama(str(tmp_path / "model.gguf"), str(tmp_path), start_token=0)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        error = (converted[name] - weight).abs().max() / weight.abs().max()
        assert error < (0.1 if weight.dim() == 2 else 1e-9)  # 16 levels between the extremes of 32 weights


def test_the_tokenizer_has_the_tokens_of_the_file(folder):
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), Encoder.load(str(folder))
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == words()
    assert encoder.num_words == len(words())
    assert encoder.special_tokens.tolist() == [0, 1, 2]
    assert tokenizer.all_special_tokens == [SPECIAL[0], SPECIAL[2]]
    for text in ("hi  hi 12", " Café ☕\n\n\tend"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_spaces_in_front_of_a_number_stay_together(folder):
    """GPT-2's pattern alone would give the second space to the digit."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("hi  12").input_ids) == ["hi", "ĠĠ", "1", "2"]


def test_the_start_token_is_the_one_that_was_asked_for(folder):
    tokenizer, config = AutoTokenizer.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    assert (
        (config["bos_token_id"], config["eos_token_id"]) == (0, 2) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )


def test_another_kind_of_model_is_refused(model, tmp_path):
    write_gguf(model, tmp_path / "model.gguf", pre="llama-bpe")
    with pytest.raises(DataError, match=r"another kind \(architecture llama, tokenizer gpt2, llama-bpe\); convert it"):
        write_llama(str(tmp_path / "model.gguf"), str(tmp_path), start_token=0)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(bytes(1000))
    with pytest.raises(DataError, match="is no GGUF file that can be read"):
        write_llama(str(tmp_path / "model.gguf"), str(tmp_path), start_token=0)
