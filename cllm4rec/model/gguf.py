"""A Llama model in a GGUF file, as a folder that transformers reads.

    write_llama(gguf_file, folder, start_token=0)       config.json, model.safetensors and the tokenizer

transformers reads GGUF files too, but needs the package accelerate for it and splits digits unlike this vocabulary.
The folder is what every other part of this package reads: `model.backbone: FOLDER`.

Shapes: O × I, the outputs and inputs of a linear layer; H heads of width D.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from cllm4rec.errors import ConfigError, DataError

Fields = dict[str, Any]
"""The metadata of a GGUF file: key → number, string or list."""

_OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
"""The type of a special token in `tokenizer.ggml.token_type`."""


def import_gguf() -> Any:
    """The package `gguf`. Raises ConfigError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            'reading a GGUF file needs the package gguf; install it with pip install "cllm4rec[weights]"'
        ) from None
    return gguf


def write_llama(gguf_file: str, folder: str, start_token: int) -> None:
    """Write config.json, model.safetensors (bfloat16, dequantized) and the tokenizer to an existing local folder.

    start_token: the token id that texts started with when the model was trained. It becomes the `bos_token` of the config
    and of the tokenizer; the GGUF file of a chat model names the start of a chat message instead.
    Raises DataError if the file holds no Llama model with tied embeddings and a byte-level BPE that splits digits.
    """
    gguf = import_gguf()
    try:
        reader = gguf.GGUFReader(gguf_file)
    except ValueError as error:
        raise DataError(f"{gguf_file} is no GGUF file that can be read ({error}); fetch it again") from None
    fields: Fields = {key: field.contents() for key, field in reader.fields.items()}
    _refuse_others(gguf_file, fields, {tensor.name for tensor in reader.tensors})
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            array = _undo_interleaving(array, heads[kind])
        weights[_name(tensor.name)] = torch.tensor(array, dtype=torch.bfloat16)
    # Not save_file, whose file only its owner may read.
    Path(folder, "model.safetensors").write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))
    _config(fields, start_token).save_pretrained(folder)
    _tokenizer(fields, start_token).save_pretrained(folder)


def _refuse_others(gguf_file: str, fields: Fields, names: set[str]) -> None:
    kind = [
        fields.get(f"general.{key}") or fields.get(f"tokenizer.ggml.{key}") for key in ("architecture", "model", "pre")
    ]
    if kind != ["llama", "gpt2", "smollm"] or "output.weight" in names:
        raise DataError(
            f"{gguf_file} holds a model of another kind (architecture {kind[0]}, tokenizer {kind[1]}, {kind[2]}); convert it "
            "with the tools of its authors and set model.backbone to the folder"
        )


def _name(gguf_name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` of `blk.3.attn_q.weight`."""
    if gguf_name in _OUTER:
        return _OUTER[gguf_name]
    layer, kind = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name).groups()  # type: ignore[union-attr]
    return f"model.layers.{layer}.{_INNER[kind]}.weight"


def _undo_interleaving(weight_OI: np.ndarray, num_heads: int) -> np.ndarray:
    """GGUF interleaves the halves of each query and key head, which transformers' rotary positions expect end to end."""
    weight_HD2I = weight_OI.reshape(num_heads, -1, 2, weight_OI.shape[-1])
    return weight_HD2I.swapaxes(1, 2).reshape(weight_OI.shape)


def _config(fields: Fields, start_token: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=float(
            f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"
        ),  # stored as float32: 9.9999997e-06
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        tie_word_embeddings=True,
        bos_token_id=start_token,
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        dtype="bfloat16",
    )


def _tokenizer(fields: Fields, start_token: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    words: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({word: token for token, word in enumerate(words)}, merges))
    # "smollm" in GGUF: every digit alone, before GPT-2's pattern. It matters for spaces in front of a number.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, fields["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=words[start_token],
        eos_token=words[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=words[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=words[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
