"""The states of texts are those that the model itself computes, whatever else is in the batch, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.families import WORKING, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.model.backbone import Backbone, wrap
from cllm4rec.model.text_states import mean_states

WORDS = Ragged.from_lists([[5, 6, 7, 8, 9], [], [11, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31]], np.int32)
LAYERS = (0, 1, 2)


def backbone_of(family: str) -> Backbone:
    config = tiny_config(family)
    config.get_text_config(decoder=True).bos_token_id = 3
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return wrap(auto.from_config(config).eval(), 32)


def own_states(backbone: Backbone, words: np.ndarray) -> np.ndarray:
    """The mean states of one text by transformers alone, without the start token.

    T5 and BART have no start token of texts: their encoders get the embedding that stands for it.
    """
    model = backbone.model
    with torch.inference_mode():
        if backbone.is_encoder_decoder:
            read_words = backbone.embed_words(torch.from_numpy(words.astype(np.int64)))
            vectors = torch.cat([backbone.unknown_K[None], read_words])[None]
            read = model.get_encoder()(inputs_embeds=vectors, output_hidden_states=True).hidden_states
        else:
            model.set_attn_implementation("eager")
            tokens = torch.tensor([[3, *words.tolist()]])
            read = model(input_ids=tokens, output_hidden_states=True).hidden_states
    means = [read[layer][0, 1:].mean(dim=0).numpy() for layer in LAYERS]
    return np.stack([np.pad(mean, (0, backbone.layer_width - len(mean))) for mean in means])


@pytest.mark.parametrize("family", [name for name in WORKING if "images" not in name])
def test_states_are_those_of_the_model_itself(family: str) -> None:
    backbone = backbone_of(family)
    together = mean_states(WORDS, backbone, LAYERS)
    for row in (0, 2, 3):
        np.testing.assert_allclose(
            together[:, row], mean_states(WORDS.take(np.array([row])), backbone, LAYERS)[:, 0], atol=1e-5
        )
    assert not together[:, 1].any(), "a text without words"
    for row in (0, 2, 3):
        np.testing.assert_allclose(together[:, row], own_states(backbone, WORDS[row]), atol=2e-4)
        if not backbone.is_encoder_decoder:
            backbone = backbone_of(family)


def test_progress_counts_the_texts_that_are_read() -> None:
    counted: list[int] = []
    mean_states(WORDS, backbone_of("llama"), (1,), counted.append)
    assert sum(counted) == 3
