"""The one Scorer: the same answer for one user or many, and what it leaves out."""

import copy

import numpy as np
import pytest
import torch
from parity import ARCHITECTURES, MAX_TOKENS, parity, recall_at_1, scorer, trained

from cllm4rec.catalog import Catalog
from cllm4rec.data.ragged import Ragged
from cllm4rec.model import ranking
from cllm4rec.model.ranking import Ranker, merged
from cllm4rec.scoring.rules import Rules
from cllm4rec.scoring.scorer import Scorer

WORLD = parity().world
USERS = WORLD.histories.user
KNOWN = WORLD.histories.together("train", "validation")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def changed(change, architecture="gpt2"):
    """A scorer around a copy of the trained model."""
    ranker = trained(architecture)
    model = copy.deepcopy(ranker.model)
    with torch.no_grad():
        change(model)
    return Scorer(Ranker(model, ranker.prompts, ranker.max_tokens), WORLD.catalog, "changed")


def lists(items, scores):
    return [(row[row >= 0].tolist(), score[row >= 0].tolist()) for row, score in zip(items, scores, strict=True)]


def one_by_one(asked, users, histories, k, **options):
    answers = [
        asked.top_k(users[row : row + 1], histories.take(np.array([row])), k, **options) for row in range(len(users))
    ]
    return tuple(np.concatenate(part) for part in zip(*answers, strict=True))


# One or many


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_is_bit_for_bit_the_same_alone_and_in_any_company(architecture, precision):
    asked = changed(lambda model: model.use_bf16() if precision == "bfloat16" else None, architecture)
    # Histories of every length, users known and not, so that the batch has rows of many shapes.
    cut = np.arange(len(USERS)) % 9
    histories = KNOWN.where(KNOWN.places < np.repeat(9 - cut, KNOWN.lengths))
    users = np.where(USERS % 5 == 4, -1, USERS)
    together = asked.top_k(users, histories, 7)
    for alone, part in zip(one_by_one(asked, users, histories, 7), together, strict=True):
        assert np.array_equal(alone, part)
    order = np.random.default_rng(0).permutation(len(users))
    for shuffled, part in zip(asked.top_k(users[order], histories.take(order), 7), together, strict=True):
        assert np.array_equal(shuffled, part[order])


def test_nobody_asked_nobody_answered():
    items, scores = scorer().top_k(np.empty(0, np.int64), Ragged.from_lists([]), 3)
    assert (items.shape, scores.shape) == ((0, 3), (0, 3))


# What is left out


def test_history_denied_and_excluded_items_are_never_recommended():
    deny, exclude = Rules(np.array([0, 7])), Ragged.from_lists([[(row * 3) % 20, 19] for row in range(len(USERS))])
    items, scores = scorer().top_k(USERS, KNOWN, 20, deny, exclude)
    out = merged(KNOWN, deny.denied(len(USERS)), exclude)
    for row, (found, found_scores) in enumerate(lists(items, scores)):
        assert set(found) == set(range(20)) - set(out[row].tolist())
        assert found_scores == sorted(found_scores, reverse=True)


def test_leaving_items_out_changes_nothing_about_the_others():
    items, scores = scorer().top_k(USERS, KNOWN, 20)
    kept_items, kept_scores = scorer().top_k(USERS, KNOWN, 20, Rules(np.array([3, 4])))
    expected = [
        [(item, score) for item, score in zip(*row, strict=True) if item not in (3, 4)] for row in lists(items, scores)
    ]
    assert [list(zip(*row, strict=True)) for row in lists(kept_items, kept_scores)] == expected


def test_where_fewer_than_k_remain_the_list_ends():
    items, scores = scorer().top_k(USERS[:2], KNOWN.take(np.array([0, 1])), 15)
    remaining = 20 - KNOWN.lengths[:2]
    assert ((items >= 0).sum(axis=1) == remaining).all()
    for row, end in enumerate(remaining):
        assert (items[row, end:] == -1).all()
        assert np.isneginf(scores[row, end:]).all()
        assert np.isfinite(scores[row, :end]).all()
    everything = Ragged.from_lists([range(20)])
    items, _ = scorer().top_k([0], everything, 3)
    assert items.tolist() == [[-1, -1, -1]]


# Cold start


COUNTS = np.arange(20) * 7 % 5  # many ties


def with_popularity():
    catalog = WORLD.catalog
    counted = Catalog(list(catalog.user_ids), list(catalog.item_ids), item_counts=COUNTS.tolist())
    return Scorer(trained(), counted, "counted")


def test_an_unknown_user_without_history_gets_popular_items():
    items, scores = with_popularity().top_k([-1], Ragged.from_lists([[]]), 20)
    expected = sorted(range(20), key=lambda item: (-COUNTS[item], item))
    assert items[0].tolist() == expected
    assert scores[0].tolist() == (COUNTS[expected] / COUNTS.sum()).astype(np.float32).tolist()


def test_rules_hold_for_popular_items_too():
    exclude = Ragged.from_lists([[5, 6]])
    items, _ = with_popularity().top_k([-1], Ragged.from_lists([[]]), 18, Rules(np.array([2])), exclude)
    expected = [item for item in sorted(range(20), key=lambda item: (-COUNTS[item], item)) if item not in (2, 5, 6)]
    assert items[0].tolist() == [*expected, -1]


def test_a_history_or_a_row_makes_nobody_cold():
    assert Scorer.is_cold(np.array([-1, -1, 0, 0]), Ragged.from_lists([[], [1], [], [1]])).tolist() == [
        True, False, False, False,
    ]  # fmt: skip
    warm, _ = scorer().top_k([-1], Ragged.from_lists([[1, 3, 5]]), 3)
    assert (warm[0] % 2 == 1).all(), "who likes odd items is recommended odd ones"


# What is read


def test_order_and_repeats_of_a_history_do_not_matter():
    backwards = Ragged.from_lists([row[::-1] for row in KNOWN.tolist()])
    repeated = Ragged.from_lists([row[:1] + row + row[-2:] for row in KNOWN.tolist()])
    expected = scorer().top_k(USERS, KNOWN, 9)
    for histories in (backwards, repeated):
        for found, part in zip(scorer().top_k(USERS, histories, 9), expected, strict=True):
            assert np.array_equal(found, part)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_of_a_history_longer_than_the_prompt_the_last_items_are_read(architecture):
    ranker = trained(architecture)
    short = Ranker(ranker.model, ranker.prompts, ranker.prompts.overhead() + 4)
    asked = Scorer(short, WORLD.catalog, "short")
    histories = KNOWN.take(np.arange(6))
    last_four = Ragged.from_lists([row[-4:] for row in histories.tolist()])
    _, expected = asked.top_k(USERS[:6], last_four, 20, exclude=histories)
    items, scores = asked.top_k(USERS[:6], histories, 20)
    assert np.array_equal(scores, expected)
    assert not any(set(row) & set(items[place].tolist()) for place, row in enumerate(histories.tolist()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_history_is_read_and_the_row_of_a_user_too(architecture):
    zeroed = changed(lambda model: model.collaborative_users.zero_(), architecture)
    assert recall_at_1(zeroed.ranker) == 1.0
    moved = changed(lambda model: model.collaborative_users[7].add_(1.0), architecture)
    _, before = scorer(architecture).top_k(USERS, KNOWN, 5)
    _, after = moved.top_k(USERS, KNOWN, 5)
    assert [row for row in range(len(USERS)) if not np.array_equal(before[row], after[row])] == [7]


# Ranking in pieces of the catalogue


@pytest.mark.parametrize("head_items", [1, 3, 7, 64])
def test_ranking_in_pieces_equals_a_stable_sort_of_everything(head_items, monkeypatch):
    """Whole numbers make every product exact, so that pieces of any size give the same logits, with many ties."""
    monkeypatch.setattr(ranking, "_HEAD_ITEMS", head_items)
    ranker, rng = trained(), np.random.default_rng(0)
    model = copy.deepcopy(ranker.model)
    table = torch.from_numpy(rng.integers(-1, 2, (20, 32))).float()
    model.collaborative_items.data = table
    hidden = torch.from_numpy(rng.integers(-1, 2, (70, 32))).float()  # more users than one piece of the head takes
    out = merged(Ragged.from_lists([rng.integers(0, 20, rng.integers(0, 21)) for _ in range(70)]))
    asked = Ranker(model, ranker.prompts, MAX_TOKENS)
    monkeypatch.setattr(Ranker, "_hidden", lambda *_: hidden)
    items, scores = asked.top_k(np.full(70, -1), out, out, 9)
    logits = (hidden @ table.T).numpy()
    logits[out.rows, out.values] = -np.inf
    order = np.argsort(-logits, axis=1, kind="stable")[:, :9]
    expected = np.take_along_axis(logits, order, axis=1)
    assert np.array_equal(scores, expected)
    assert np.array_equal(items, np.where(np.isneginf(expected), -1, order))
