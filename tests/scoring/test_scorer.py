"""The one Scorer: the same answer for one user or many, and what it leaves out."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from support.parity import ARCHITECTURES, MAX_TOKENS, NARROW, parity, recall_at_1, scorer, trained

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.model import ranker as ranking
from cllm4rec.model.ranker import Ranker
from cllm4rec.scoring import scorer as scorer_module
from cllm4rec.scoring.rules import Rules
from cllm4rec.scoring.scorer import Scorer

WORLD = parity().world
USERS = WORLD.histories.user
KNOWN = WORLD.histories.together("train", "validation")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def changed(change, architecture="gpt2", id_width=None):
    """A scorer around a copy of the trained model."""
    ranker = trained(architecture, id_width)
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
@pytest.mark.parametrize("id_width", [None, NARROW])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_is_bit_for_bit_the_same_alone_and_in_any_company(architecture, id_width, precision):
    asked = changed(lambda model: model.compute_in(getattr(torch, precision)), architecture, id_width)
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


def test_history_blocked_and_excluded_items_are_never_recommended():
    rules, exclude = Rules(np.array([0, 7])), Ragged.from_lists([[(row * 3) % 20, 19] for row in range(len(USERS))])
    items, scores = scorer().top_k(USERS, KNOWN, 20, rules, exclude)
    out = Ragged.interleave(KNOWN, exclude, Ragged.from_lists([[0, 7]] * len(USERS))).unique()
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


# Boosts and caps


def ruled(rng, num_categories=4):
    """Rules of all kinds for 20 items, with whole and half numbers as boosts for exact ties."""
    boost_J = rng.integers(-4, 5, 20).astype(np.float32) / 2
    categories = Ragged.from_lists([np.flatnonzero(rng.random(num_categories) < 0.3) for _ in range(20)])
    return Rules(np.unique(rng.integers(0, 20, 2)), boost_J, categories, int(rng.integers(1, 4)))


def slowly(score_J, out, rules, k):
    """The next best item unless it is out or one of its categories is full, one at a time."""
    taken, num_of = [], {}
    for item in sorted(range(20), key=lambda item: (-score_J[item], item)):
        codes = rules.categories[item].tolist()
        full = any(num_of.get(code, 0) >= rules.max_per_category for code in codes)
        if len(taken) < k and item not in out and item not in rules.blocked and not full:
            taken.append(item)
            num_of.update({code: num_of.get(code, 0) + 1 for code in codes})
    return taken


@pytest.mark.parametrize("candidates", [1, 2, 30])
@pytest.mark.parametrize("head_items", [3, 64])
def test_boosts_and_caps_equal_a_slow_reference(candidates, head_items, monkeypatch):
    """Whole numbers make every product exact; the number of candidates ranked at a time must not matter."""
    monkeypatch.setattr(ranking, "_HEAD_ITEMS", head_items)
    monkeypatch.setattr(scorer_module, "_CANDIDATES", candidates)
    rng, num_users = np.random.default_rng(candidates), 70
    hidden = torch.from_numpy(rng.integers(-1, 2, (num_users, 32))).float()
    table = torch.from_numpy(rng.integers(-1, 2, (20, 32))).float()
    asked = changed(lambda model: model.collaborative_items.data.copy_(table))
    monkeypatch.setattr(Ranker, "encode_users", lambda *_: hidden)
    logits_BJ = (hidden @ table.T).numpy()
    num_short = 0
    for _ in range(10):
        rules, k = ruled(rng), int(rng.integers(1, 12))
        exclude = Ragged.from_lists([rng.integers(0, 20, rng.integers(0, 9)) for _ in range(num_users)])
        items, scores = asked.top_k(np.zeros(num_users), Ragged.from_lists([[]] * num_users), k, rules, exclude)
        for row, (found, found_scores) in enumerate(lists(items, scores)):
            score_J = logits_BJ[row] + rules.boost_J
            assert found == slowly(score_J, exclude[row].tolist(), rules, k)
            assert found_scores == score_J[found].tolist()
            assert np.isneginf(scores[row, len(found) :]).all()
            num_short += len(found) < k
    assert num_short > 50, "lists that end early are part of the question"


def test_popular_items_keep_the_caps():
    rng = np.random.default_rng(0)
    for _ in range(20):
        rules = dataclasses.replace(ruled(rng), boost_J=None)
        items, _ = with_popularity().top_k(
            [-1, -1], Ragged.from_lists([[], []]), 6, rules, Ragged.from_lists([[5], []])
        )
        for row, out in zip(items, [[5], []], strict=True):
            assert row[row >= 0].tolist() == slowly(COUNTS, out, rules, 6)


def test_under_rules_too_an_answer_is_the_same_alone_and_a_shorter_list_is_its_beginning():
    asked, rules = with_popularity(), ruled(np.random.default_rng(1))
    users = np.where(USERS % 5 == 4, -1, USERS)
    histories = KNOWN.where(KNOWN.rows % 10 != 9)  # some have neither row nor history
    together = asked.top_k(users, histories, 7, rules)
    for alone, part in zip(one_by_one(asked, users, histories, 7, rules=rules), together, strict=True):
        assert np.array_equal(alone, part)
    for shorter, part in zip(asked.top_k(users, histories, 3, rules), together, strict=True):
        assert np.array_equal(shorter, part[:, :3])


def test_rules_that_say_nothing_change_no_bit():
    none = Rules(boost_J=np.zeros(20, np.float32), categories=Ragged.from_lists([[0]] * 20), max_per_category=20)
    for rules in (Rules(), none):
        for found, part in zip(scorer().top_k(USERS, KNOWN, 20, rules), scorer().top_k(USERS, KNOWN, 20), strict=True):
            assert np.array_equal(found, part)


def test_a_boost_is_added_to_the_score_and_moves_the_item():
    items, scores = scorer().top_k(USERS, KNOWN, 20)
    boost_J = np.zeros(20, np.float32)
    boost_J[5] = 100.0
    boosted_items, boosted_scores = scorer().top_k(USERS, KNOWN, 20, Rules(boost_J=boost_J))
    for row in range(len(USERS)):
        before = dict(zip(items[row].tolist(), scores[row].tolist(), strict=True))
        after = dict(zip(boosted_items[row].tolist(), boosted_scores[row].tolist(), strict=True))
        seen = 5 in KNOWN[row]
        assert (5 in after, boosted_items[row, 0] == 5) == (not seen, not seen)
        assert {j: np.float32(score) + boost_J[j] for j, score in before.items()} == after


def test_a_scorer_follows_when_the_rules_change():
    asked = Scorer(trained(), WORLD.catalog, "one")
    one, other = Rules(np.array([0, 1])), Rules(np.array([2, 3]))
    for rules, out in ((one, {0, 1}), (other, {2, 3}), (None, set()), (one, {0, 1})):
        items, _ = asked.top_k([-1, 0], Ragged.from_lists([[], []]), 20, rules)
        assert set(range(20)) - set(items[0].tolist()) == set(range(20)) - set(items[1].tolist()) == out


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


def test_a_boost_multiplies_the_odds_of_a_popular_item():
    boost_J = np.zeros(20, np.float32)
    boost_J[[3, 8, 9]] = [0.75, 5000.0, -5000.0]
    items, scores = with_popularity().top_k([-1], Ragged.from_lists([[]]), 20, Rules(boost_J=boost_J))
    share_J = COUNTS / COUNTS.sum()
    share_J[3] *= np.exp(0.75)
    assert items[0, 0] == 8
    assert np.isfinite(scores).all()
    assert (np.diff(scores[0]) <= 0).all()
    rest = [item for item in sorted(range(20), key=lambda item: (-share_J[item], item)) if item not in (8, 9)]
    assert [item for item in items[0].tolist() if item not in (8, 9)] == rest
    assert scores[0, items[0] == 3] == np.float32(share_J[3])


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


# Ranking in pieces of the catalog


@pytest.mark.parametrize("head_items", [1, 3, 7, 64])
def test_ranking_in_pieces_equals_a_stable_sort_of_everything(head_items, monkeypatch):
    """Whole numbers make every product exact, so that pieces of any size give the same logits, with many ties."""
    monkeypatch.setattr(ranking, "_HEAD_ITEMS", head_items)
    ranker, rng = trained(), np.random.default_rng(0)
    model = copy.deepcopy(ranker.model)
    table = torch.from_numpy(rng.integers(-1, 2, (20, 32))).float()
    model.collaborative_items.data = table
    hidden = torch.from_numpy(rng.integers(-1, 2, (70, 32))).float()  # more users than one piece of the head takes
    out = Ragged.from_lists([rng.integers(0, 20, rng.integers(0, 21)) for _ in range(70)]).unique()
    asked = Ranker(model, ranker.prompts, MAX_TOKENS)
    monkeypatch.setattr(Ranker, "encode_users", lambda *_: hidden)
    items, scores = asked.top_k(np.full(70, -1), out, out, 9)
    logits = (hidden @ table.T).numpy()
    logits[out.rows, out.values] = -np.inf
    order = np.argsort(-logits, axis=1, kind="stable")[:, :9]
    expected = np.take_along_axis(logits, order, axis=1)
    assert np.array_equal(scores, expected)
    assert np.array_equal(items, np.where(np.isneginf(expected), -1, order))


# Similar items


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_similar_items_are_those_of_the_largest_cosine_alone_and_in_any_company(precision):
    asked = changed(lambda model: model.compute_in(getattr(torch, precision)))
    table_JD = asked.ranker.model.collaborative_items.detach().float().numpy().astype(np.float64)
    unit_JD = table_JD / np.linalg.norm(table_JD, axis=1, keepdims=True)
    cosine_JJ = unit_JD @ unit_JD.T
    np.fill_diagonal(cosine_JJ, -np.inf)
    every = np.arange(len(table_JD))
    items, scores = asked.similar(every, 5)
    np.testing.assert_allclose(scores, -np.sort(-cosine_JJ, axis=1)[:, :5], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(cosine_JJ, items, 1), scores, atol=1e-5)
    for item in every:
        alone, its_scores = asked.similar(every[item : item + 1], 5)
        assert np.array_equal(alone[0], items[item])
        assert np.array_equal(its_scores[0], scores[item])


def test_items_that_the_same_users_like_are_similar():
    items, _ = scorer().similar(np.arange(WORLD.num_items), 3)
    assert (items % 2 == np.arange(WORLD.num_items)[:, None] % 2).mean() > 0.9


def test_blocked_items_are_similar_to_nothing_and_boosts_change_no_cosine():
    plain, cosines = scorer().similar(np.array([0]), 3)
    boost_J = np.zeros(WORLD.num_items, np.float32)
    boost_J[plain[0, 1]] = 50
    ruled, ruled_cosines = scorer().similar(np.array([0]), 2, Rules(blocked=plain[0, :1], boost_J=boost_J))
    assert np.array_equal(ruled[0], plain[0, 1:])
    assert np.array_equal(ruled_cosines[0], cosines[0, 1:])


def test_item_without_an_embedding_is_similar_to_nothing_and_breaks_nothing():
    def forget(model):
        model.collaborative_items[4] = 0

    items, scores = changed(forget).similar(np.array([4, 0]), WORLD.num_items)
    assert not np.isnan(scores).any()
    assert set(scores[0, :-1]) == {0.0}
    assert items[0, -1] == -1, "the item itself is left out"
