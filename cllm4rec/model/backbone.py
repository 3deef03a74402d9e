"""The language model behind one interface: embeddings in, hidden states out.

`Decoder` runs decoder-only models such as GPT-2, Llama and Gemma on packed rows. `EncoderDecoder` runs T5 and its relatives
with the prompt in the encoder and the main text in the decoder. Both call the stack of layers of a transformers model, so
whatever a family does outside of it (scaled words, soft caps and scales of logits) is repeated here; `family_check` compares
the two for every model that is not built by this package.

Shapes: R rows × T columns of a grid, S of its slots, K hidden size, N words.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from cllm4rec.errors import ConfigError
from cllm4rec.model import attention
from cllm4rec.model.batch import TensorGrid


@dataclasses.dataclass(frozen=True)
class WordHead:
    """The output layer that predicts words: logits = cap(scale · hidden · tableᵀ + bias), cap(x) = softcap · tanh(x / softcap).

    table_NK: N' × K with N' >= N. It is the table of the word embeddings if the model ties the two.
    bias_N: None for none.
    """

    table_NK: Tensor
    bias_N: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_SK: Tensor) -> Tensor:
        """(S, N')."""
        logits_SN = torch.nn.functional.linear(hidden_SK * self.scale, self.table_NK, self.bias_N)
        return logits_SN if self.softcap is None else self.softcap * torch.tanh(logits_SN / self.softcap)


class Backbone(nn.Module, abc.ABC):
    """A language model without its embedding lookup: callers look up words and IDs and pass in vectors."""

    is_encoder_decoder: bool
    """Whether the prompt and the main text are two grids, one for the encoder and one for the decoder."""

    width: int
    """The size K of embeddings and of final hidden states."""

    unknown_K: Tensor
    """The embedding of a user that is not known, (K,)."""

    def __init__(self, model: Any, max_tokens: int) -> None:
        super().__init__()
        self.model = model
        if not getattr(model.config, "final_norm", True):
            remove_final_norm(model)
        check_positions(self.text_config, max_tokens)
        self.width = int(self.word_embeddings.shape[1])
        self.register_buffer("unknown_K", self._unknown_user(), persistent=False)

    @property
    def text_config(self) -> Any:
        """The config of the language model, which is a part of the config of a model for images and texts."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def num_layers(self) -> int:
        """The number of layers that `layer_states` runs through."""
        return int(self.text_config.num_hidden_layers)

    @property
    def layer_width(self) -> int:
        """The size of the states between layers: `width`, but in models such as OPT-350M, which project narrower words."""
        return int(self.text_config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def word_embeddings(self) -> nn.Parameter:
        """N' × K with N' >= N: the table of the words of prompts and texts, as stored. `embed_words` reads it."""
        weight: nn.Parameter = self.model.get_input_embeddings().weight
        return weight

    def embed_words(self, words_S: Tensor) -> Tensor:
        """The embeddings of words, (S, K), as the model itself embeds them: Gemma scales them by √K."""
        vectors_SK: Tensor = self.model.get_input_embeddings()(words_S)
        return vectors_SK

    @property
    def word_std(self) -> float:
        """The standard deviation of the embeddings that `embed_words` returns."""
        with torch.no_grad():
            sample = torch.arange(min(len(self.word_embeddings), 256), device=self.word_embeddings.device)
            scale = self.embed_words(sample).float().norm() / self.word_embeddings[sample].float().norm()
            return float(self.word_embeddings.float().std()) * float(scale)

    @property
    def word_head(self) -> WordHead:
        """The output layer that predicts words."""
        head, config = self.model.get_output_embeddings(), self.text_config
        bias = getattr(self.model, "final_logits_bias", None) if head is None or head.bias is None else head.bias
        return WordHead(
            self.word_embeddings if head is None else head.weight,
            None if bias is None else bias.flatten(),
            scale=float(getattr(config, "logit_scale", None) or 1.0)
            / float(getattr(config, "logits_scaling", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    @property
    def start_token(self) -> int:
        """The token id that the decoder of an encoder-decoder starts with. Raises TypeError for a decoder-only model."""
        raise TypeError(f"{type(self).__name__} is a decoder-only model and has no start token")

    @abc.abstractmethod
    def forward(self, embeddings: tuple[Tensor, ...], grids: tuple[TensorGrid, ...]) -> Tensor:
        """Map the embeddings of each grid, (R, T, K), to the hidden states of the last grid, (R, T, K), in `dtype`."""

    @abc.abstractmethod
    def layer_states(self, embeddings: tuple[Tensor, ...], grids: tuple[TensorGrid, ...]) -> tuple[Tensor, ...]:
        """The states of the first grid before the first layer and after each layer, (R, T, K) each.

        An encoder-decoder gives those of its encoder. The layers must be transformers' own (not `accelerate`).
        """

    def checkpoint_layers(self) -> None:
        """Keep only the inputs of each layer for the backward pass, and compute the rest again there."""
        if hasattr(self.model, "activation_checkpointing_enable"):
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        else:  # transformers before its renaming
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()  # a condition of transformers; there is no dropout

    @torch.no_grad()
    def _unknown_user(self) -> Tensor:
        """The embedding of the start token, or else of the mean word; zero in a GPT-2 without a start token.

        Zero would stay zero through all layers of a model without biases and positions. The gradient of each of its norms is
        then 1/√eps, which overflows in a deep model.
        """
        start, words = getattr(self.text_config, "bos_token_id", None), self.word_embeddings
        if isinstance(start, int) and 0 <= start < len(words):
            return self.embed_words(torch.tensor([start], device=words.device))[0]
        if self.text_config.model_type == "gpt2":
            return torch.zeros(self.width, dtype=words.dtype, device=words.device)
        return self.embed_words(torch.arange(len(words), device=words.device)).mean(dim=0)


class Decoder(Backbone):
    """A causal model over packed rows: a token attends to the earlier tokens of its own document."""

    is_encoder_decoder = False

    def __init__(self, model: Any, max_tokens: int) -> None:
        super().__init__(model, max_tokens)
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(attention.IMPLEMENTATION, attention.attend)
        AttentionMaskInterface.register(attention.IMPLEMENTATION, sdpa_mask)
        model.set_attn_implementation(attention.IMPLEMENTATION)

    @property
    def layers(self) -> Any:
        """The model without its output layer and, in a model for images and texts, without its image encoder."""
        base = self.model.base_model
        return getattr(base, "language_model", base)

    def forward(self, embeddings: tuple[Tensor, ...], grids: tuple[TensorGrid, ...]) -> Tensor:
        hidden: Tensor = self._run(embeddings, grids).last_hidden_state
        return hidden

    def layer_states(self, embeddings: tuple[Tensor, ...], grids: tuple[TensorGrid, ...]) -> tuple[Tensor, ...]:
        return tuple(self._run(embeddings, grids, output_hidden_states=True).hidden_states)

    def _run(self, embeddings: tuple[Tensor, ...], grids: tuple[TensorGrid, ...], **options: bool) -> Any:
        (vectors,), (grid,) = embeddings, grids
        # transformers passes a mask of four dimensions on unchanged. Without one it would derive documents from positions.
        unused_mask = vectors.new_empty(0, 0, 0, 0)
        return self.layers(
            inputs_embeds=vectors,
            position_ids=grid.position_RT,
            attention_mask=unused_mask,
            use_cache=False,
            layout=grid.layout,
            **options,
        )


class EncoderDecoder(Backbone):
    """An encoder-decoder such as T5: one document per row, so ordinary padding masks suffice."""

    is_encoder_decoder = True

    @property
    def start_token(self) -> int:
        return int(self.model.config.decoder_start_token_id)

    def forward(self, embeddings: tuple[Tensor, ...], grids: tuple[TensorGrid, ...]) -> Tensor:
        (prompt, main), (encoder, decoder) = embeddings, grids
        prompt_mask = encoder.is_token()
        encoded = self.model.get_encoder()(inputs_embeds=prompt, attention_mask=prompt_mask).last_hidden_state
        hidden: Tensor = self.model.get_decoder()(
            inputs_embeds=main,
            attention_mask=decoder.is_token(),
            encoder_hidden_states=encoded,
            encoder_attention_mask=prompt_mask,
            use_cache=False,
        ).last_hidden_state
        return hidden * self.width**-0.5 if _scales_outputs(self.model.config) else hidden

    def layer_states(self, embeddings: tuple[Tensor, ...], grids: tuple[TensorGrid, ...]) -> tuple[Tensor, ...]:
        mask = grids[0].is_token()
        output = self.model.get_encoder()(inputs_embeds=embeddings[0], attention_mask=mask, output_hidden_states=True)
        return tuple(output.hidden_states)


def wrap(model: Any, max_tokens: int) -> Backbone:
    """The backbone of a transformers model with an output layer."""
    return EncoderDecoder(model, max_tokens) if model.config.is_encoder_decoder else Decoder(model, max_tokens)


def _scales_outputs(config: Any) -> bool:
    """Whether a model divides final hidden states by √K before its output layer, as T5 1.0 and UMT5 do."""
    is_scaled = config.model_type in ("umt5", "switch_transformers") and config.tie_word_embeddings
    return bool(getattr(config, "scale_decoder_outputs", is_scaled))


def check_positions(config: Any, max_tokens: int) -> None:
    """Raise ConfigError if a model has fewer positions than `max_tokens`. T5's relative positions have no limit."""
    limit = getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None)
    if limit is not None and limit < max_tokens and not hasattr(config, "relative_attention_num_buckets"):
        raise ConfigError(f"model.max_tokens {max_tokens} is more than the {limit} positions of the backbone; lower it")


def remove_final_norm(model: nn.Module) -> None:
    """Output the residual stream of the last layer without normalization.

    The final norm gives all hidden states the same length, so the component that all histories share hides their
    differences (docs/decisions.md, "Model and training").
    """
    base: Any = model.base_model
    stack = base.decoder if hasattr(base, "decoder") else base
    for name in _FINAL_NORMS:
        if hasattr(stack, name):
            setattr(stack, name, _SkippedNorm(getattr(stack, name)))


class _SkippedNorm(nn.Module):
    """Returns its input. The weights of the norm stay as buffers, so that a saved model is complete."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, weight in norm.named_parameters():
            self.register_buffer(name, weight.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


_FINAL_NORMS = ("ln_f", "norm", "final_layer_norm")
"""The names of the final norm in GPT-2, Llama and T5, the architectures that this package builds."""
