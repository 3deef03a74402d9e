"""The training data of baselines: the histories of all users, and texts as word counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import BackboneSize, ModelConfig
from cllm4rec.data import world as worlds
from cllm4rec.data.documents import Documents
from cllm4rec.data.tokenizer import Encoder, save_tokenizer, tokenize_prompts
from cllm4rec.errors import DataError
from cllm4rec.evaluation.baseline import TrainingData, item_texts_with_reviews
from cllm4rec.experiments.baselines.text import tf_idf, word_counts
from cllm4rec.storage.files import write_table


def test_baselines_are_fitted_on_all_users_or_none() -> None:
    world = worlds.parity_world()
    with pytest.raises(DataError, match="39 of 40 users"):
        TrainingData.of(world.histories.take(np.arange(39)), world.catalog)


def test_an_items_reviews_are_read_after_its_own_text(tmp_path: Path) -> None:
    own = ["warm wood, oiled", ""]
    reviews = {(0, 1): "a sharp, odd thing!", (1, 1): "sharper than <|endoftext|>", (2, 0): "rounder than I thought"}
    catalog = Catalog(["u", "v", "w"], ["a", "b"], None, own)
    save_tokenizer(ModelConfig(backbone=BackboneSize(vocab_size=300)), reviews.values(), str(tmp_path / "tokenizer"))
    encoder = Encoder.load(str(tmp_path / "tokenizer"))
    prompts, token_space = tokenize_prompts(encoder), catalog.token_space(encoder.num_words)
    user, item = np.array(list(reviews)).T
    documents = [
        prompts.interactions(token_space, np.arange(3), Ragged.from_lists([[1], [1], [0]])),
        prompts.reviews(token_space, user, item, encoder.encode(list(reviews.values()))),
        prompts.item_texts(token_space, np.array([0]), encoder.encode(own[:1])),
    ]
    write_table(Documents.concat(documents).to_arrow(), str(tmp_path / "documents" / "bucket-00000.parquet"))
    texts = item_texts_with_reviews(str(tmp_path), catalog)
    assert texts == ["warm wood, oiled rounder than I thought", texts[1]]
    assert texts[1].startswith(" a sharp, odd thing! sharper than ")


def test_words_that_tell_no_texts_apart_are_left_out() -> None:
    texts = ["The red, red box", "the blue box", "a blue BOX, the only"]
    assert word_counts(texts).toarray().tolist() == [
        [0],
        [1],
        [1],
    ]  # blue; the and box are everywhere, red and only once
    texts.append("")
    counts = word_counts(texts)
    assert counts.shape == (4, 3)
    assert counts.sum() == 2 + 3 + 3
    lengths = np.linalg.norm(tf_idf(texts).toarray(), axis=1)
    np.testing.assert_allclose(lengths, [1, 1, 1, 0], atol=1e-6)


def test_rarer_words_weigh_more_and_only_the_most_frequent_are_kept() -> None:
    texts = ["wood oak", "wood oak", "wood", "wood elm", "elm steel"]
    row = tf_idf(texts)[[0]].toarray()[0]  # elm, oak, wood
    assert row[1] / row[2] == pytest.approx(np.log(5 / 2) / np.log(5 / 4))
    assert word_counts(texts, max_words=1).toarray().ravel().tolist() == [1, 1, 1, 1, 0]
