"""Language models that are built from scratch, by `BackboneSize`: architecture, initialization and final norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cllm4rec.config import BackboneSize
from cllm4rec.model.backbone import Backbone, wrap


def build_backbone(size: BackboneSize, num_words: int, max_tokens: int, seed: int) -> Backbone:
    """A newly initialized language model of the given size. The same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[size.architecture](size, num_words, max_tokens)
    model.config.final_norm = size.final_norm  # saved with the weights, in config.json
    if not size.final_norm:
        model.config.scale_decoder_outputs = False  # T5's division belongs to its final norm
    if size.copying_heads:
        init_copying_heads(model)
    return wrap(model, max_tokens)


def init_copying_heads(model: nn.Module) -> None:
    """Set value and output projections to the identity, so that each attention layer returns the mean of its inputs.

    Heads whose value-output product has positive eigenvalues copy what they attend to; pretrained models develop them
    (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits). Random projections scramble a history, and
    the frozen tied head cannot undo this: it cost a seventh of Recall@20 on the sample world (docs/log.md, "A built
    backbone starts by copying").
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("attn.c_attn.weight"):  # GPT-2 concatenates query, key and value
                weight[:, -len(weight) :] = torch.eye(len(weight))
            elif name.endswith(_VALUE_AND_OUTPUT):
                weight.copy_(torch.eye(len(weight)))


_VALUE_AND_OUTPUT = (
    "attn.c_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "Attention.v.weight",
    "Attention.o.weight",
)


def _gpt2(size: BackboneSize, num_words: int, max_tokens: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: nn.Module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=num_words,
            n_positions=max_tokens,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return model


def _llama(size: BackboneSize, num_words: int, max_tokens: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=num_words,
            hidden_size=size.width,
            intermediate_size=4 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=max_tokens,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return model


def _t5(size: BackboneSize, num_words: int, max_tokens: int) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    model: nn.Module = T5ForConditionalGeneration(
        T5Config(
            vocab_size=num_words,
            d_model=size.width,
            d_kv=size.width // size.heads,
            d_ff=4 * size.width,
            num_layers=size.layers,
            num_heads=size.heads,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )
    return model


_BUILDERS: dict[str, Callable[[BackboneSize, int, int], Any]] = {"gpt2": _gpt2, "llama": _llama, "t5": _t5}
