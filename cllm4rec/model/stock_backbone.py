"""Stock language models: GPT-2, Llama, Qwen, Gemma, T5 and others, by name or folder.

    check_stock_backbone(config.model)                       before anything starts: can this model be used?
    pretrained_backbone(name, revision, max_tokens, dtype)   the model with its weights

Code that comes with a model is never run, and weights are read from safetensors only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from cllm4rec.config import ModelConfig
from cllm4rec.errors import ConfigError
from cllm4rec.model.backbone import Backbone, check_positions, wrap
from cllm4rec.model.cllm4rec import check_id_width
from cllm4rec.model.family_check import check_family
from cllm4rec.storage import hub


def pretrained_backbone(
    name: str, revision: str | None, max_tokens: int, dtype: torch.dtype | None = torch.float32, device: str = "cpu"
) -> Backbone:
    """Load a model by name or folder, without dropout.

    dtype: the precision of the weights. Files are read shard by shard, straight into it and onto the device, so a bfloat16
    model needs half the memory of a float32 one at its peak, too. None: that of the files, whose weights stay memory-mapped
    on a CPU.
    Raises ConfigError if the model cannot be loaded.
    """
    folder = hub.weights_folder(name, revision)
    config = stock_config(folder, None)
    if not hasattr(config, "final_norm"):  # otherwise this package built the model
        check_family(config, name, max_tokens)
    model = _from_pretrained(name, folder, config, dtype, None if device == "cpu" else device)
    return wrap(model, max_tokens)


def _from_pretrained(name: str, folder: str, config: Any, dtype: torch.dtype | None, device: str | None) -> Any:
    """The model of a folder, with every weight of its config. Raises ConfigError if one is missing or has another shape."""
    with _one_sentence(name), quiet_transformers():
        model, info = _auto(config).from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            device_map=device,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in one sentence
        )
    # transformers would fill each of these with new random numbers.
    missing, reshaped = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        raise ConfigError(
            f"the backbone {name!r} lacks {len(missing)} of the weights that its config describes, such as {missing[0]}; copy "
            "the model again, or correct its config.json"
        )
    if reshaped:
        weight, found, expected = reshaped[0]
        raise ConfigError(
            f"the backbone {name!r} has {len(reshaped)} weights of other shapes than its config describes, such as {weight} "
            f"with {tuple(found)} instead of {tuple(expected)}; copy its config.json and its weights from the same model"
        )
    return model


def random_backbone(
    name: str, revision: str | None, max_tokens: int, seed: int, dtype: torch.dtype = torch.float32
) -> Backbone:
    """A model of the same architecture with random weights, as transformers initializes it: a control for what was pretrained."""
    config = stock_config(hub.config_folder(name, revision), None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _auto(config).from_config(config, dtype=dtype, trust_remote_code=False)
    return wrap(model, max_tokens)


def check_stock_backbone(model: ModelConfig, num_words: int | None = None) -> None:
    """Raise ConfigError if `model.backbone` names a model that cannot be used.

    Of the weights only the headers are read, if the files are on this machine: each weight must be there, in its shape.
    num_words: the number of tokens of the tokenizer, if it is known.
    """
    if not isinstance(model.backbone, str):
        return
    name, config = model.backbone, stock_config(model.backbone, model.revision)
    check_positions(config.get_text_config(decoder=True), model.max_tokens)
    check_family(config, name, model.max_tokens)
    num_embeddings, width = empty_model(config).get_input_embeddings().weight.shape
    check_id_width(model.id_width, width)
    if num_words is not None:
        check_vocabulary(name, num_embeddings, num_words)
    folder = hub.local_weights_folder(name, model.revision)
    if folder is not None:
        _from_pretrained(name, folder, config, None, "meta")


def check_vocabulary(name: str, num_embeddings: int, num_words: int) -> None:
    """Raise ConfigError if a tokenizer with `num_words` tokens cannot belong to a model with `num_embeddings` words.

    Models pad their vocabulary by a few percent at most.
    """
    if not 0.9 * num_embeddings <= num_words <= num_embeddings:
        raise ConfigError(
            f"the tokenizer of {name!r} has {num_words} tokens, but its model has {num_embeddings} word embeddings; use a "
            "folder whose tokenizer and model match"
        )


def stock_config(name: str, revision: str | None) -> Any:
    """The config of a model, without dropout. Raises ConfigError if there is none or if it asks for a quantized model."""
    from transformers import AutoConfig

    folder = hub.config_folder(name, revision)
    with _one_sentence(name):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        raise ConfigError(
            f"the backbone {name!r} has a PEFT adapter beside its weights (adapter_config.json); merge the two into one model first "
            "(merge_and_unload of peft)"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"the backbone {name!r} is a quantized checkpoint, through which tables cannot be trained exactly; use the "
            "unquantized model of the same name (its frozen weights take 2 bytes each in bfloat16)"
        )
    for part in {id(part): part for part in (config, config.get_text_config(decoder=True))}.values():
        if getattr(part, "activation_function", None) == "gelu_new":
            part.activation_function = "gelu_pytorch_tanh"  # a faster implementation of the same function
        for setting, value in vars(part).items():
            if "drop" in setting and isinstance(value, float):
                setattr(part, setting, 0.0)
    return config


def empty_model(config: Any) -> Any:
    """A model without memory for its weights, on torch's meta device, to count and name them."""
    with torch.device("meta"):
        return _auto(config).from_config(config, trust_remote_code=False)


def _auto(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar per file, even of a model that loads in a millisecond, and no report of what errors say already."""
    from transformers.utils import logging

    was_enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_enabled:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turn errors of transformers about a model into a ConfigError."""
    from safetensors import SafetensorError

    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        AttributeError,
        TypeError,
        SafetensorError,
    ) as error:
        words = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the backbone {name!r} cannot be loaded ({type(error).__name__}: {words}); check the folder, copy it again if a "
            "file is damaged, or use another model"
        ) from None
