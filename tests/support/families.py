"""Tiny configs of many families of language models, as transformers describes them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

_LLAMA: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {**_LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 32}
_T5 = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": 128,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
_GEMMA3 = {**_LLAMA, "num_hidden_layers": 6, "sliding_window": 6, "query_pre_attn_scalar": 8}

WORKING: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),
    "gpt2, scores divided by the layer": ("gpt2", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "llama": ("llama", _LLAMA),
    "llama, llama3 rope": ("llama", {**_LLAMA, "rope_parameters": _LLAMA3_ROPE}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA),
    "qwen3_moe": ("qwen3_moe", {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "smollm3": ("smollm3", {**_LLAMA, "num_hidden_layers": 4}),
    "mistral": ("mistral", _LLAMA),
    "mistral, short window": ("mistral", {**_LLAMA, "sliding_window": 6}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4}),
    "gpt_neox": ("gpt_neox", _LLAMA),
    "opt": ("opt", _OPT),
    "opt, narrow words": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "phi": ("phi", _LLAMA),
    "phi3": ("phi3", _LLAMA),
    "olmo2": ("olmo2", _LLAMA),
    "gemma": ("gemma", _LLAMA),
    "gemma2": (
        "gemma2",
        {
            **_LLAMA,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": ("gemma3_text", _GEMMA3),
    "gemma3 with images": ("gemma3", {"text_config": _GEMMA3, "vision_config": _VISION, "mm_tokens_per_image": 4}),
    "gpt_oss": ("gpt_oss", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "granite": ("granite", {**_LLAMA, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2}),
    "cohere": ("cohere", {**_LLAMA, "logit_scale": 0.25}),
    "cohere2": ("cohere2", {**_LLAMA, "logit_scale": 0.25, "num_hidden_layers": 4, "sliding_window": 6}),
    "starcoder2": ("starcoder2", _LLAMA),
    "glm": ("glm", _LLAMA),
    "t5": ("t5", _T5),
    "t5, untied": ("t5", {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("mt5", _T5),
    "umt5": ("umt5", _T5),
    "bart": ("bart", _BART),
}
"""What is special → model_type and settings."""

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {**_LLAMA, "is_decoder": False}),
    "bloom": ("bloom", {"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "gpt_neo": ("gpt_neo", {**_LLAMA, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "gptj": ("gptj", {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "lfm2, with convolutions": ("lfm2", {**_LLAMA, "layer_types": ["conv", "full_attention"]}),
    "mamba": ("mamba", {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}),
    "mpt": ("mpt", {"vocab_size": 128, "d_model": 32, "n_layers": 2, "n_heads": 4}),
}


def tiny_config(family: str) -> Any:
    """The config of a family above, without dropout."""
    model_type, settings = {**WORKING, **REFUSED}[family]
    config = AutoConfig.for_model(model_type, **settings)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config
