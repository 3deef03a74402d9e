"""The language model behind one interface: embeddings in, hidden states out.

`Decoder` runs decoder-only models such as GPT-2 and Llama on packed rows. `EncoderDecoder` runs T5 with the prompt in the
encoder and the main text in the decoder. Both use transformers' auto classes, so other models that these classes load
also work.

Shapes: R rows × T columns of a grid, K hidden size, N words.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cllm4rec.config import BackboneSize, ModelConfig
from cllm4rec.errors import ArtifactError, ConfigError
from cllm4rec.model import attention
from cllm4rec.model.batch import TensorGrid
from cllm4rec.storage import files

_REFERENCE = "reference.json"


class Backbone(nn.Module, abc.ABC):
    """A language model without its embedding lookup: callers look up words and IDs and pass in vectors."""

    is_encoder_decoder: bool
    """Whether the prompt and the main text are two grids, one for the encoder and one for the decoder."""

    def __init__(self, model: Any, max_tokens: int) -> None:
        super().__init__()
        self.model = model
        if not getattr(model.config, "final_norm", True):
            _remove_final_norm(model)
        limit = getattr(model.config, "n_positions", None) or getattr(model.config, "max_position_embeddings", None)
        if limit is not None and limit < max_tokens and not self.is_encoder_decoder:
            raise ConfigError(
                f"model.max_tokens {max_tokens} is more than the {limit} positions of the backbone; lower it"
            )

    @property
    def width(self) -> int:
        """The hidden size K."""
        return int(self.model.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def word_embeddings(self) -> nn.Parameter:
        """N' × K with N' >= N: the embeddings of the words of prompts and texts."""
        weight: nn.Parameter = self.model.get_input_embeddings().weight
        return weight

    @property
    def vocabulary_head(self) -> nn.Parameter:
        """N' × K: the output layer that predicts words. It is `word_embeddings` if the model ties the two."""
        head = self.model.get_output_embeddings()
        weight: nn.Parameter = self.word_embeddings if head is None else head.weight
        return weight

    @property
    def start_token(self) -> int:
        """The token id that the decoder of an encoder-decoder starts with. Raises TypeError for a decoder-only model."""
        raise TypeError(f"{type(self).__name__} is a decoder-only model and has no start token")

    @abc.abstractmethod
    def forward(self, embeddings: tuple[Tensor, ...], grids: tuple[TensorGrid, ...]) -> Tensor:
        """Map the embeddings of each grid, (R, T, K), to the hidden states of the last grid, (R, T, K), in `dtype`."""

    def digest(self) -> str:
        """sha256 of the names, shapes and float32 bytes of all weights. Training with a frozen backbone keeps it."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            sha.update(f"{name}{tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()


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

    def forward(self, embeddings: tuple[Tensor, ...], grids: tuple[TensorGrid, ...]) -> Tensor:
        (vectors,), (grid,) = embeddings, grids
        # transformers passes a mask of four dimensions on unchanged. Without one it would derive documents from positions.
        unused_mask = vectors.new_empty(0, 0, 0, 0)
        output = self.model.base_model(
            inputs_embeds=vectors,
            position_ids=grid.position_RT,
            attention_mask=unused_mask,
            use_cache=False,
            layout=grid.layout,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


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
        # T5 1.0 divides by sqrt(K) before its output layer. Its logits would be out of scale without this.
        return hidden * self.width**-0.5 if self.model.config.scale_decoder_outputs else hidden


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
    return EncoderDecoder(model, max_tokens) if size.architecture == "t5" else Decoder(model, max_tokens)


def _remove_final_norm(model: nn.Module) -> None:
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
"""The names of the final norm in GPT-2, Llama and T5, the architectures that this module builds."""


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


def pretrained_backbone(name: str, revision: str | None, max_tokens: int) -> Backbone:
    """Load a model by name or folder, in float32 and without dropout. Raises ConfigError if it cannot be loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # a faster implementation of the same function
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(name, revision=revision, config=config, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the backbone {name!r} cannot be loaded ({reason}); set model.backbone to a folder with config.json and "
            "model.safetensors, to a model name on a hub that this machine can reach, or to a size to build"
        ) from None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return EncoderDecoder(model, max_tokens) if config.is_encoder_decoder else Decoder(model, max_tokens)


def new_backbone(config: ModelConfig, num_words: int, seed: int) -> Backbone:
    """The untrained backbone that `model.backbone` describes.

    Raises ConfigError if it cannot be loaded, or if it has fewer word embeddings than the tokenizer has tokens.
    """
    if isinstance(config.backbone, BackboneSize):
        return build_backbone(config.backbone, num_words, config.max_tokens, seed)
    backbone = pretrained_backbone(config.backbone, config.revision, config.max_tokens)
    if len(backbone.word_embeddings) < num_words:
        raise ConfigError(
            f"the tokenizer of {config.backbone!r} has {num_words} tokens, but its model has "
            f"{len(backbone.word_embeddings)} word embeddings; use a folder whose tokenizer and model match"
        )
    return backbone


def save_backbone(backbone: Backbone, directory: str) -> None:
    """Write the safetensors and the config of a backbone that this package built or trained."""
    with tempfile.TemporaryDirectory() as folder, _no_progress_bars():
        backbone.model.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            files.write_bytes(files.join(directory, file.name), file.read_bytes())


def save_reference(backbone: Backbone, config: ModelConfig, directory: str) -> None:
    """Write the name, revision and digest of a pretrained backbone instead of its weights."""
    reference = {"name": config.backbone, "revision": config.revision, "digest": backbone.digest()}
    files.write_json(files.join(directory, _REFERENCE), reference)


def load_backbone(directory: str, max_tokens: int) -> Backbone:
    """Load the backbone that `save_backbone` or `save_reference` wrote.

    Raises ArtifactError if the digest of a referenced backbone has changed.
    """
    if _REFERENCE in files.list_files(directory):
        reference = files.read_json(files.join(directory, _REFERENCE))
        backbone = pretrained_backbone(reference["name"], reference["revision"], max_tokens)
        if backbone.digest() != reference["digest"]:
            raise ArtifactError(
                f"the backbone {reference['name']!r} is not the one these tables were trained with (its digest differs); "
                "restore the former one or train again"
            )
        return backbone
    with local_copy(directory) as folder, _no_progress_bars():
        return pretrained_backbone(folder, None, max_tokens)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar per file, even for a model that loads in a millisecond."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


class local_copy:  # noqa: N801 - reads as a verb in a with statement
    """A local copy of a directory, removed at the end of the block. A local directory is used as it is."""

    def __init__(self, directory: str) -> None:
        self._fs, self._path = files.filesystem(directory)
        self._temporary: str | None = None

    def __enter__(self) -> str:
        if "file" in self._fs.protocol:
            return self._path
        self._temporary = tempfile.mkdtemp()
        self._fs.get(self._path.rstrip("/") + "/", self._temporary, recursive=True)
        return self._temporary

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            shutil.rmtree(self._temporary)
