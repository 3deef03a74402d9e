"""A tiny Llama model, as transformers holds it and as llama.cpp would write it, and packages that contain it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
INNER = {
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


def tiny_llama() -> Any:
    """4 query heads, 2 key heads, 2 layers, random weights that bfloat16 represents exactly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():  # and not the buffers, which transformers never rounds
        weight.data = weight.data.bfloat16().float()
    return model


def words() -> list[str]:
    """The special tokens, all bytes in GPT-2's spelling, and what the merges of `merges` make."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges())]


def merges() -> list[str]:
    return ["Ġ Ġ", "h i", "Ġ hi"]


def write_gguf(model: Any, path: Path, quantization: str = "F32", pre: str = "smollm") -> str:
    """Write a model as llama.cpp's converter does. Returns the sha256 of the file."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(words()) - len(SPECIAL)))
    writer.add_token_merges(merges())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, array in tensors(model).items():
        is_linear = array.ndim == 2 and kind != gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            name, gguf.quants.quantize(array, kind) if is_linear else array, raw_dtype=kind if is_linear else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors(model: Any) -> dict[str, np.ndarray]:
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for layer in range(model.config.num_hidden_layers):
        for kind, name in INNER.items():
            array = state[f"model.layers.{layer}.{name}.weight"]
            found[f"blk.{layer}.{kind}.weight"] = interleaved(array, heads[kind]) if kind in heads else array
    return found


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Row by row: row 2i of a head is row i of its first half, row 2i + 1 is row i of its second half."""
    width = len(weight) // num_heads
    order = [
        head * width + half * width // 2 + i for head in range(num_heads) for i in range(width // 2) for half in (0, 1)
    ]
    return weight[order]


def write_wheel(folder: Path, *contents: Path) -> str:
    """A wheel that pip installs from its path, without an index. It contains some files."""
    wheel, info = folder / "tiny_weights-1.0-py3-none-any.whl", "tiny_weights-1.0.dist-info"
    with ZipFile(wheel, "w") as archive:
        for path in contents:
            archive.write(path, f"tiny_weights/{path.name}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return str(wheel)
