"""The pretrained language model behind one protocol: embeddings in, hidden states out.

`Decoder` runs GPT-2, Llama and their like on packed rows; `EncoderDecoder` runs T5, prompt in the encoder and main text in
the decoder. Both come from transformers' auto classes: a model of another name that loads there works here.

Lengths: R rows × T columns of a grid, K hidden size, N words.
"""

from __future__ import annotations

import abc
import hashlib
import shutil
import tempfile
from collections.abc import Callable
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
    """A language model without its embedding of text: callers look words and IDs up and hand vectors in."""

    pairs: bool
    """True where prompt and main text are two grids (an encoder-decoder)."""

    def __init__(self, model: Any, max_tokens: int) -> None:
        super().__init__()
        self.model = model
        if not getattr(model.config, "final_norm", True):
            _without_final_norm(model)
        limit = getattr(model.config, "n_positions", None) or getattr(model.config, "max_position_embeddings", None)
        if limit is not None and limit < max_tokens and not self.pairs:
            raise ConfigError(
                f"model.max_tokens {max_tokens} is more than the {limit} positions of the backbone; lower it"
            )

    @property
    def width(self) -> int:
        """K."""
        return int(self.model.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def word_embeddings(self) -> nn.Parameter:
        """N' × K with N' >= N: what prompts and texts are read through."""
        weight: nn.Parameter = self.model.get_input_embeddings().weight
        return weight

    @property
    def vocabulary_head(self) -> nn.Parameter:
        """N' × K: what words are predicted with; the word embeddings where the model ties them."""
        head = self.model.get_output_embeddings()
        weight: nn.Parameter = self.word_embeddings if head is None else head.weight
        return weight

    @property
    def start_token(self) -> int:
        """The word a decoder of pairs starts with."""
        raise TypeError(f"{type(self).__name__} reads one grid and has no decoder to start")

    @abc.abstractmethod
    def forward(self, embeddings: tuple[Tensor, ...], grids: tuple[TensorGrid, ...]) -> Tensor:
        """Vectors of shape (R, T, K) for each grid in, hidden states (R, T, K) of the last grid out, in the model's dtype."""

    def digest(self) -> str:
        """sha256 over names, shapes and float32 bytes of all weights: equal before and after means frozen."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            sha.update(f"{name}{tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()


class Decoder(Backbone):
    """A causal model over packed rows: a token sees the earlier tokens of its own document."""

    pairs = False

    def __init__(self, model: Any, max_tokens: int) -> None:
        super().__init__(model, max_tokens)
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(attention.IMPLEMENTATION, attention.attend)
        AttentionMaskInterface.register(attention.IMPLEMENTATION, sdpa_mask)
        model.set_attn_implementation(attention.IMPLEMENTATION)

    def forward(self, embeddings: tuple[Tensor, ...], grids: tuple[TensorGrid, ...]) -> Tensor:
        (vectors,), (grid,) = embeddings, grids
        # A mask of four dimensions is taken as it is; without one transformers would look for documents in the positions.
        unused = vectors.new_empty(0, 0, 0, 0)
        output = self.model.base_model(
            inputs_embeds=vectors,
            position_ids=grid.position_RT,
            attention_mask=unused,
            use_cache=False,
            layout=grid.layout,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


class EncoderDecoder(Backbone):
    """T5: one document a row, so ordinary padding masks."""

    pairs = True

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
        # T5 1.0 divides by sqrt(K) before its head; without it the head's logits are out of scale.
        return hidden * self.width**-0.5 if self.model.config.scale_decoder_outputs else hidden


def build_backbone(size: BackboneSize, num_words: int, max_tokens: int, seed: int) -> Backbone:
    """A fresh language model of the given size, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[size.architecture](size, num_words, max_tokens)
    model.config.final_norm = size.final_norm  # kept in config.json, and so with the weights
    if not size.final_norm:
        model.config.scale_decoder_outputs = False  # T5's division, which goes with its norm
    if size.copying_heads:
        start_with_copying_heads(model)
    return EncoderDecoder(model, max_tokens) if size.architecture == "t5" else Decoder(model, max_tokens)


def _without_final_norm(model: nn.Module) -> None:
    """Hand the last layer's sum on as it is. The norm gives every hidden state one length, so that what is common to all
    histories drowns what differs (DECISIONS.md, "Quality")."""
    base: Any = model.base_model
    stack = base.decoder if hasattr(base, "decoder") else base
    for name in _FINAL_NORMS:
        if hasattr(stack, name):
            setattr(stack, name, _Unused(getattr(stack, name)))


class _Unused(nn.Module):
    """Hands its input on. The norm's weights stay as buffers, so that what is saved is a whole model's."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, weight in norm.named_parameters():
            self.register_buffer(name, weight.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


_FINAL_NORMS = ("ln_f", "norm", "final_layer_norm")
"""Of GPT-2, Llama and T5, the architectures that are built here."""


def start_with_copying_heads(model: nn.Module) -> None:
    """Make every attention pass on the mean of what it sees, unmixed: value and output projections become the identity.

    Heads whose value-output product has positive eigenvalues copy what they attend to; pretrained models grow them
    (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits). Random ones scramble a history instead, and
    the frozen tied head cannot undo it: on the sample world that cost a seventh of Recall@20 (DECISIONS.md).
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("attn.c_attn.weight"):  # GPT-2 keeps query, key and value side by side
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
    """A model by name or folder, in float32 and without dropout. Raises ConfigError where there is none."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # the same function, faster
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(name, revision=revision, config=config, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the backbone {name!r} cannot be loaded ({reason}); give model.backbone a folder with config.json and "
            "model.safetensors, a name the hub can be reached for, or a size to build"
        ) from None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return EncoderDecoder(model, max_tokens) if config.is_encoder_decoder else Decoder(model, max_tokens)


def new_backbone(config: ModelConfig, num_words: int, seed: int) -> Backbone:
    """What `model.backbone` describes, before any training. Raises ConfigError where it does not fit the tokenizer."""
    if isinstance(config.backbone, BackboneSize):
        return build_backbone(config.backbone, num_words, config.max_tokens, seed)
    backbone = pretrained_backbone(config.backbone, config.revision, config.max_tokens)
    if len(backbone.word_embeddings) < num_words:
        raise ConfigError(
            f"the tokenizer of {config.backbone!r} has {num_words} tokens and its model {len(backbone.word_embeddings)} "
            "word embeddings; give a folder in which the two belong together"
        )
    return backbone


def save_backbone(backbone: Backbone, directory: str) -> None:
    """Write the model's own safetensors and config, for a backbone that was built or trained here."""
    with tempfile.TemporaryDirectory() as folder:
        backbone.model.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            files.write_bytes(files.join(directory, file.name), file.read_bytes())


def save_reference(backbone: Backbone, config: ModelConfig, directory: str) -> None:
    """Write name, revision and digest of a stock backbone instead of its weights."""
    reference = {"name": config.backbone, "revision": config.revision, "digest": backbone.digest()}
    files.write_json(files.join(directory, _REFERENCE), reference)


def load_backbone(directory: str, max_tokens: int) -> Backbone:
    """The backbone that `save_backbone` or `save_reference` wrote. A stock one must have the digest it had then."""
    if _REFERENCE in files.list_files(directory):
        reference = files.read_json(files.join(directory, _REFERENCE))
        backbone = pretrained_backbone(reference["name"], reference["revision"], max_tokens)
        if backbone.digest() != reference["digest"]:
            raise ArtifactError(
                f"the backbone {reference['name']!r} is not the one these tables were trained with (its digest differs); "
                "put the former one back or train again"
            )
        return backbone
    with local_copy(directory) as folder:
        return pretrained_backbone(folder, None, max_tokens)


class local_copy:  # noqa: N801 - reads as a verb in a with statement
    """A local folder with the files of a directory; the directory itself where it is local already."""

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
