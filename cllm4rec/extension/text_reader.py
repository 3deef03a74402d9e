"""Reads texts with a language model, with progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from cllm4rec.data.tokenizer import Encoder
from cllm4rec.extension.text_kernels import Texts
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.text_states import mean_states

ShowCount = Callable[[Callable[[], int], int, str, str], AbstractContextManager[None]]
"""`cllm4rec.progress.show_count`."""


def layers_of(fractions: Sequence[float], num_layers: int) -> tuple[int, ...]:
    """The layers at these fractions of a model's depth, ascending, each once; 1 is the first layer."""
    return tuple(sorted({max(1, round(fraction * num_layers)) for fraction in fractions}))


def read_texts(
    texts: list[str],
    encoder: Encoder,
    max_text_tokens: int,
    backbone: Backbone,
    layers: tuple[int, ...],
    show_count: ShowCount,
) -> Texts:
    """The texts with their mean states in `layers`, of the first `max_text_tokens` tokens of each."""
    num_read = 0

    def count(number: int) -> None:
        nonlocal num_read
        num_read += number

    with show_count(lambda: num_read, len(texts), "texts", "read"):
        return Texts(texts, layers, mean_states(encoder.encode(texts, max_text_tokens), backbone, layers, count))
