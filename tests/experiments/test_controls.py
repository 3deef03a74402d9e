"""Controls of a comparison: what stays and what goes when texts are shuffled, and what random weights replace."""

import numpy as np
import pytest
from support.weights import digest_of_weights

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.experiments.comparison.controls import shuffled_texts
from cllm4rec.experiments.comparison.methods import config_of, phases_of
from cllm4rec.experiments.comparison.trial import Data, MethodRun, fit, of_split, run_method
from cllm4rec.storage.files import join, read_json


def documents_of(kind: Kind, users: list[int], items: list[int]) -> Documents:
    """Each document has a token of its own: 100 times its user plus its item."""
    user, item = np.array(users, np.int64), np.array(items, np.int64)
    own = Ragged.from_lists([[100 * max(u, 0) + i] for u, i in zip(users, items, strict=True)], np.int32)
    empty = Ragged.empty(len(users))
    return Documents(np.full(len(users), int(kind), np.int8), user, item, own, own, empty)


REVIEWS = documents_of(Kind.REVIEW, [1, 2, 1, 3, 2, 1], [10, 11, 12, 13, 14, 15])
ITEM_TEXTS = documents_of(Kind.ITEM_TEXT, [-1] * 4, [20, 21, 22, 23])
HISTORIES = documents_of(Kind.INTERACTIONS, [1, 2, 3], [-1] * 3)


@pytest.mark.parametrize("seed", range(5))
def test_each_review_goes_to_another_item_of_its_reviewer(seed):
    shuffled = shuffled_texts(Documents.concat([REVIEWS, ITEM_TEXTS, HISTORIES]), seed)
    written, about, by = shuffled.main.values[:6], shuffled.item[:6], shuffled.user[:6]
    assert (written // 100 == by).all(), "who wrote it is kept"
    assert sorted(written) == sorted(REVIEWS.main.values)
    is_alone = by == 3
    assert ((written % 100 == about) == is_alone).all()
    assert sorted(shuffled.main.values[6:10]) == [20, 21, 22, 23]
    assert (shuffled.main.values[6:10] != shuffled.item[6:10]).all()
    np.testing.assert_array_equal(shuffled.main.values[10:], HISTORIES.main.values)
    np.testing.assert_array_equal(shuffled.prompt.values, [*REVIEWS.prompt.values, 20, 21, 22, 23, 99, 199, 299])


def test_texts_at_the_start_are_not_read_again(comparison):
    config = config_of("texts_at_start", of_split(comparison, 0), {})
    assert config.model.table_init == "texts"
    assert [phase.name for phase in phases_of("texts_at_start", config) if phase.epochs] == ["pretrain", "finetune"]
    assert {phase.text_fraction for phase in phases_of("texts_at_start", config) if phase.epochs} <= {0.0, 1.0}


def test_shuffled_texts_change_where_item_embeddings_start(comparison):
    split = of_split(comparison, 0)
    data = Data.load(split.run.prepared)
    settings = {"finetune.epochs": 0, "pretrain.epochs": 1, "pretrain.warmup_epochs": 0, "pretrain.learning_rate": 1e-9}
    own, shuffled = (fit(name, settings, data, split).model for name in ("cllm4rec", "shuffled_texts"))
    assert own is not None
    assert shuffled is not None
    assert (own.collaborative_items - shuffled.collaborative_items).abs().max() > 1e-3
    assert digest_of_weights(own.backbone) == digest_of_weights(shuffled.backbone)


def test_random_weights_are_skipped_where_the_language_model_is_random_already(comparison):
    run = MethodRun(of_split(comparison, 0), "random_lm")
    result = read_json(join(run_method(run), "result.json"))
    assert "random weights, so there is nothing to replace" in result["skipped"]
