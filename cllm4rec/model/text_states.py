"""Reads texts with a language model: one vector per text, from the layers that are asked for.

Shapes: D texts, L layers, K hidden size, S slots of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cllm4rec.arrays.ids import NOBODY, TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.packing import Batch, Packer, PairPacker, first_fit
from cllm4rec.typing import Float32Array, IntArray

_SLOTS = 2048


@torch.inference_mode()
def mean_states(
    words: Ragged, backbone: Backbone, layers: Sequence[int], progress: Callable[[int], object] = lambda num: None
) -> Float32Array:
    """The mean hidden state of each text in each of `layers`, (L, D, K); zeros for a text without words. K is the width of the
    layers, and states that are narrower end in zeros: OPT-350M projects what its last layer returns.

    words: the tokens of each text. A decoder reads the embedding of an unknown user before them: its start token, on which
    pretrained models park attention. It is not part of the mean. Texts longer than the model's positions are an error.
    layers: 0 is the embeddings, 1 the output of the first layer.
    progress: called with the number of texts of each batch.
    """
    model = CLLM4Rec(backbone, TokenSpace(len(backbone.word_embeddings), 0, 0), std=0.0).eval()
    model.precision = backbone.dtype
    device = backbone.word_embeddings.device
    states_LDK = np.zeros((len(layers), len(words), backbone.layer_width), np.float32)
    order = np.argsort(words.lengths, kind="stable")
    order = order[words.lengths[order] > 0]
    groups, _ = first_fit(words.lengths[order] + 1, max(_SLOTS, int(words.lengths.max(initial=0)) + 1))
    for group in groups:
        rows = order[group]
        batch, slots = _layout(words.take(rows), model)
        read = model.layer_states(batch_to_device(batch, device))
        owner = torch.from_numpy(np.repeat(np.arange(len(rows)), words.lengths[rows])).to(device)
        where = torch.from_numpy(slots).to(device)
        length = torch.from_numpy(words.lengths[rows]).to(device)[:, None]
        for number, layer in enumerate(layers):
            state_SK = read[layer].index_select(0, where).float()
            total_DK = torch.zeros(len(rows), state_SK.shape[1], device=device).index_add_(0, owner, state_SK)
            states_LDK[number, rows, : total_DK.shape[1]] = (total_DK / length).cpu().numpy()
        progress(len(rows))
    return states_LDK


def _layout(words: Ragged, model: CLLM4Rec) -> tuple[Batch, IntArray]:
    """The texts as a batch, and the slots of their words, text by text. The texts are prompts: nothing is predicted."""
    none, start = np.full(len(words), -1, np.int64), Ragged(np.full(len(words), NOBODY), np.arange(len(words) + 1))
    sequence = Ragged.interleave(start, words)
    empty = Ragged.empty(len(words))
    documents = Documents(np.full(len(words), int(Kind.ITEM_TEXT), np.int8), none, none, sequence, empty, empty)
    is_word = sequence.places > 0
    if model.backbone.is_encoder_decoder:
        batch = PairPacker(model.token_space, 0, model.backbone.start_token).layout(documents)
        columns = batch.grids[0].segment_RT.shape[1]
        return batch, (sequence.rows * columns + sequence.places)[is_word]
    size = len(sequence.values)
    return Packer(model.token_space, size, size).layout(documents), np.flatnonzero(is_word)
