from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import BackboneSize
from cllm4rec.data.documents import Prompts
from cllm4rec.model.built_backbone import build_backbone
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.ranker import Ranker, _single_threaded_pool


def queries_with(num_threads, precision, width, id_width):
    """Queries at sizes where dividing a product over threads changes its bits."""
    torch.manual_seed(0)
    num_users, num_items, num_words = 60, 400, 300
    size = BackboneSize(layers=1, width=width, heads=4, vocab_size=num_words)
    model = CLLM4Rec(
        build_backbone(size, num_words, 512, 0), TokenSpace(num_words, num_users, num_items), id_width=id_width
    )
    model.train_only(())
    model.compute_in(precision)
    lengths = np.random.default_rng(0).integers(1, 300, num_users)
    histories = Ragged.from_lists([np.arange(length) for length in lengths])
    ranker = Ranker(model, Prompts.tokenize(lambda text: [len(text)] * 3), 512)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return ranker.encode_users(np.arange(num_users), histories)
    finally:
        torch.set_num_threads(before)


# At width 512 a fused MLP has two parts.
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "id_width"), [(384, None), (512, None), (512, 192)])
def test_queries_have_the_same_bits_with_any_number_of_threads(precision, width, id_width):
    alone = queries_with(1, precision, width, id_width)
    assert alone.shape == (60, id_width or width)
    assert float(alone.std()) > 0
    for num_threads in (2, 3):
        assert torch.equal(queries_with(num_threads, precision, width, id_width), alone)


def test_ranking_threads_do_not_change_the_thread_count_of_other_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside = set(_single_threaded_pool(3).map(lambda _: torch.get_num_threads(), range(9)))
        with ThreadPoolExecutor(1) as other_thread:
            outside = other_thread.submit(torch.get_num_threads).result()
        assert (inside, outside, torch.get_num_threads()) == ({1}, 3, 3)
    finally:
        torch.set_num_threads(before)
