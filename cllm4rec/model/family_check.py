"""Checks that a family of language models computes the same here as in transformers, before it is used.

Documents are packed and IDs are passed in as embeddings, so a model runs in parts (`backbone`). What a family does between
these parts, or in its attention, would be lost in silence. The check builds a small copy of the model, with its config but few
layers and words, and compares hidden states and logits of a few words with the model's own `forward(input_ids)`. It therefore
needs no weights, takes a second, and holds for any size of the model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.errors import ConfigError
from cllm4rec.model.accelerate import accelerate
from cllm4rec.model.backbone import Backbone, wrap
from cllm4rec.model.batch import TensorGrid, batch_to_device
from cllm4rec.model.packing import Packer, PairPacker, Table

FAMILIES = (
    "bart",
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "mt5",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "t5",
    "umt5",
)
"""Families that a test runs through the check, by `model_type`. Others that pass it work as well."""

TOLERANCE = 2e-3
"""The largest accepted difference of hidden states and of logits, relative to their root mean square, in float32."""
_NUM_WORDS = 96
_WIDEST = 512
_DOCUMENTS = (9, 5, 12)
"""Tokens of the compared documents. With a sliding window they are longer than the window."""


def check_family(config: Any, name: str, max_tokens: int) -> None:
    """Raise ConfigError if a model of this config computes other hidden states or logits here than in transformers.

    name: of the model, for the error. max_tokens: of the longest document; a longer sliding window needs no check.
    """
    fault = _fault(_Hashable(config, config.to_json_string(use_diff=False)), max_tokens)
    if fault:
        raise ConfigError(
            f"the backbone {name!r} is of the family {config.model_type}, which {fault}; use a model of another family, such "
            f"as {', '.join(FAMILIES)}"
        )


@dataclasses.dataclass(frozen=True)
class _Hashable:
    """A config of transformers, equal to another one with the same settings."""

    config: Any = dataclasses.field(compare=False)
    settings: str


@functools.cache
def _fault(key: _Hashable, max_tokens: int) -> str | None:
    try:
        difference = family_difference(key.config, max_tokens)
    except Exception as error:  # a family may fail in any way
        words = " ".join(str(error).split())[:200]
        return f"does not run on packed documents ({type(error).__name__}: {words})"
    for what, size in difference.items():
        if not size <= TOLERANCE:
            return f"gives other {what} on packed documents than in transformers (by {size:.2g} of their size)"
    return None


def family_difference(config: Any, max_tokens: int) -> dict[str, float]:
    """The largest difference of `hidden states` and `logits` to transformers' own, relative to their root mean square.

    Raises whatever the model raises if it does not run.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    small = _small_config(config)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(
            small, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
        ).eval()
        _randomize(model)
    documents = _documents(_lengths(small, max_tokens), small.is_encoder_decoder)
    with torch.no_grad():
        expected = [_own_forward(model, documents, row) for row in range(len(documents))]
        backbone = _prepare(wrap(model, int(documents.lengths.max())))
        packed = _packed_forward(backbone, documents)
        alone = [_packed_forward(backbone, documents.take(np.array([row])))[0] for row in range(len(documents))]
        head = backbone.word_head
        pairs = list(zip([*packed, *alone], [*expected, *expected], strict=True))
        return {
            "hidden states": _difference((found, own) for found, (own, _) in pairs),
            "logits": _difference((head.logits(found), own) for found, (_, own) in pairs),
        }


def _difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    worst = [float((found - own).abs().max() / own.square().mean().sqrt()) for found, own in pairs]
    return max(worst) if np.isfinite(worst).all() else float("inf")


def _prepare(backbone: Backbone) -> Backbone:
    """As in training, with all layers replaced that training replaces. Dropout that is left shows as a difference."""
    backbone.requires_grad_(False)
    accelerate(backbone, torch.float32)
    return backbone.train()


def _small_config(config: Any) -> Any:
    """The config with as few layers as show every kind of layer, few words, and narrow inner layers."""
    small = copy.deepcopy(config)
    for part in {id(part): part for part in (small, small.get_text_config(decoder=True))}.values():
        for setting in (
            "num_hidden_layers",
            "num_layers",
            "num_decoder_layers",
            "encoder_layers",
            "decoder_layers",
            "n_layer",
        ):
            _shrink_layers(part, setting)
        for setting, most in {
            "vocab_size": _NUM_WORDS,
            "intermediate_size": _WIDEST,
            "ffn_dim": _WIDEST,
            "encoder_ffn_dim": _WIDEST,
            "decoder_ffn_dim": _WIDEST,
            "d_ff": _WIDEST,
            "num_local_experts": max(8, getattr(part, "num_experts_per_tok", None) or 0),
            "num_experts": max(8, getattr(part, "num_experts_per_tok", None) or 0),
        }.items():
            value = getattr(part, setting, None)
            if isinstance(value, int) and value > most:
                setattr(part, setting, most)
        for setting in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            token = getattr(part, setting, None)
            if not isinstance(token, int) or token >= _NUM_WORDS:
                setattr(part, setting, 0 if setting == "decoder_start_token_id" else None)
    return small


def _shrink_layers(part: Any, setting: str) -> None:
    number = part.__dict__.get(setting)
    if not isinstance(number, int) or number <= 2:
        return
    per_layer = {name: value for name, value in vars(part).items() if isinstance(value, list) and len(value) == number}
    fewest = 2
    while any({*map(str, value[:fewest])} != {*map(str, value)} for value in per_layer.values()):
        fewest += 1
    setattr(part, setting, fewest)
    for name, value in per_layer.items():
        setattr(part, name, value[:fewest])


def _randomize(model: nn.Module) -> None:
    """Draw weights for which scores, gates and logits are of order 1, so that no part of the model vanishes."""
    is_embedding = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for weight in model.parameters():
        if weight.dim() < 2:
            weight.data.add_(0.3 * torch.randn_like(weight))
        else:
            gain = 1.5 if weight.dim() == 2 else 0.5  # experts (three dimensions) amplify rounding errors
            weight.data.normal_(std=1.0 if id(weight) in is_embedding else gain * min(weight.shape[-2:]) ** -0.5)
    words: Any = model.get_input_embeddings()  # type: ignore[operator]
    words.weight.data /= words(torch.arange(_NUM_WORDS)).detach().std()


def _lengths(config: Any, max_tokens: int) -> list[int]:
    text = config.get_text_config(decoder=True)
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    short = [window for window in windows if isinstance(window, int) and window < max_tokens]
    longest = min(max_tokens, max(short, default=0) + _DOCUMENTS[-1])
    return [*_DOCUMENTS[:-1], longest]


def _documents(lengths: list[int], is_encoder_decoder: bool) -> Documents:
    """Documents of random words; for an encoder-decoder, half of each is the prompt."""
    rng = np.random.default_rng(0)
    words = [rng.integers(3, _NUM_WORDS, length) for length in lengths]
    ends = [length // 2 if is_encoder_decoder else length for length in lengths]
    none = np.full(len(lengths), -1, np.int64)
    return Documents(
        np.full(len(lengths), int(Kind.ITEM_TEXT), np.int8),
        none,
        none,
        Ragged.from_lists([row[:end] for row, end in zip(words, ends, strict=True)], np.int32),
        Ragged.from_lists([row[end:] for row, end in zip(words, ends, strict=True)], np.int32),
        Ragged.empty(len(lengths)),
    )


def _own_forward(model: Any, documents: Documents, row: int) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of a document by transformers alone, (T, K) and (T, N)."""
    prompt, main = (torch.from_numpy(part[row].astype(np.int64))[None] for part in (documents.prompt, documents.main))
    heard: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    if model.config.is_encoder_decoder:
        start = torch.full((1, 1), int(model.config.decoder_start_token_id))
        logits = model(
            input_ids=prompt, decoder_input_ids=torch.cat([start, main[:, :-1]], dim=1), use_cache=False
        ).logits
    else:
        logits = model(input_ids=prompt, use_cache=False).logits
    hook.remove()
    return heard[0][0], logits[0]


def _packed_forward(backbone: Backbone, documents: Documents) -> list[Tensor]:
    """The hidden states of each document, packed together, (T, K) each."""
    space = TokenSpace(_NUM_WORDS, 1, 1)
    batch = (
        PairPacker(space, 0, backbone.start_token).layout(documents)
        if backbone.is_encoder_decoder
        else Packer(space, int(documents.lengths.sum()) + 3, int(documents.lengths.max())).layout(documents)
    )
    grids = batch_to_device(batch, torch.device("cpu")).grids
    hidden_SK = backbone(tuple(_embed(backbone, grid) for grid in grids), grids).flatten(0, 1)
    if not backbone.is_encoder_decoder:
        ends = documents.prompt.offsets
        return [hidden_SK[begin:end] for begin, end in itertools.pairwise(ends)]
    columns = grids[1].segment_RT.shape[1]
    lengths = documents.main.lengths.tolist()
    return [hidden_SK[row * columns : row * columns + length] for row, length in enumerate(lengths)]


def _embed(backbone: Backbone, grid: TensorGrid) -> Tensor:
    slots, words = grid.lookups[Table.WORDS]
    vectors_SK = torch.zeros(grid.segment_RT.numel(), backbone.width)
    return vectors_SK.index_copy(0, slots, backbone.embed_words(words)).view(*grid.segment_RT.shape, -1)
