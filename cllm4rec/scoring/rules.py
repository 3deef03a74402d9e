"""Rules for what may be recommended, in addition to the scores. The nightly job and the endpoint use the same code.

    rules = read_rules(config.score.rules, catalog, day)      # or RuleBook.read(...).on(day) for several days
    scorer.top_k(users, histories, k, rules)

An item is blocked for all users if it is denied, missing in an allow list, used by fewer than `min_support` users in
training (each pair of user and item counts once), or not available on the day. The remaining items are ranked by score plus
boost. A list is filled from the best item down; an item is skipped if one of its categories already has `max_per_category`
items in the list. The Scorer leaves out what a user has seen. `cllm4rec.scoring.rule_files` describes the files.

Lengths: B users, J items, C candidates of a user, best first.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
from collections.abc import Iterable

import numpy as np

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged, chunks
from cllm4rec.config import RulesConfig
from cllm4rec.errors import DataError
from cllm4rec.scoring.rule_files import FILES, RuleFile, read_content, read_rule_file
from cllm4rec.storage import files
from cllm4rec.typing import BoolArray, Float32Array, IntArray

_ALLOWED_CELLS = 1 << 24
_UNKNOWN = {
    "deny": "denied",
    "allow": "allowed",
    "categories": "categorized",
    "availability": "dated",
    "boost": "boosted",
}


# Rules are compared by identity, not by value, because a Scorer caches by identity.
@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """The rules of one day in the indices of one catalog. They are arrays, so that they can be pickled and sent to actors.

    blocked: item indices that are recommended to no user, ascending and without repeats.
    boost_J: added to every user's scores; None for no boost.
    categories: one row of category codes per item; None without caps. A list holds at most `max_per_category` items of one
    category.
    counts: for a report, how many items each rule removes or changes, and how many ids of its file are unknown.
    """

    blocked: IntArray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    boost_J: Float32Array | None = None
    categories: Ragged | None = None
    max_per_category: int | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def within_caps(self, candidates_BC: IntArray) -> BoolArray:
        """Which candidates are taken by a list that is filled from the best down and skips items of a full category.

        candidates_BC: item indices, distinct within a row; -1 for no item, which is never taken. The first n that are taken
        also form the list of length n: no later candidate changes an earlier choice.
        """
        keep_CB = candidates_BC.T >= 0
        if self.categories is None:
            return keep_CB.T
        num_candidates, num_users = keep_CB.shape
        keep = keep_CB.ravel().copy()
        # Ordered by rank: the best candidates of all users, then the second ones, so that one rank is one slice.
        entries = self.categories.take(np.maximum(candidates_BC.T.ravel(), 0))
        pairs = (entries.rows % num_users) * self._num_categories + entries.values
        distinct, pair_of = np.unique(pairs, return_inverse=True)
        num_taken = np.zeros(len(distinct), np.int64)
        for rank in range(num_candidates):
            begin, end = entries.offsets[[rank * num_users, (rank + 1) * num_users]]
            candidates, found = entries.rows[begin:end], pair_of[begin:end]
            keep[candidates[num_taken[found] >= self._cap]] = False
            num_taken[found[keep[candidates]]] += 1  # an item's categories differ, so no pair comes twice
        return keep.reshape(num_candidates, num_users).T

    def full_categories(self, items: Ragged) -> Ragged:
        """For each list, the items of the categories that are full in it, with repeats."""
        if self.categories is None:
            return Ragged.empty(len(items))
        pairs, num_taken = np.unique(self._categories_of(items).keys(self._num_categories), return_counts=True)
        full = pairs[num_taken >= self._cap]
        members = self._members.take(full % self._num_categories)
        return Ragged.from_rows(members.values, (full // self._num_categories)[members.rows], len(items))

    def violations(self, items: Ragged) -> dict[str, BoolArray]:
        """Rules that finished lists violate: description → one flag per value of `items`.

        A description continues "a user is recommended ...".
        """
        return {"a blocked item": np.isin(items.values, self.blocked), **self._over_caps(items)}

    def num_allowed(self, items: Ragged, seen: Ragged, num_items: int) -> IntArray:
        """How many further items each list could hold: unseen, not blocked, not in the list, and of no full category.

        A list shorter than k is correct if and only if this number is 0, with caps and without: a skipped item never fits
        later, because categories only fill up. items, seen: item indices, one row per user. The time grows with B × J, so
        pass short lists only.
        """
        size = max(1, _ALLOWED_CELLS // num_items)
        counts = [self._num_allowed(items.take(rows), seen.take(rows), num_items) for rows in chunks(len(items), size)]
        return np.concatenate([np.empty(0, np.int64), *counts])

    def _num_allowed(self, items: Ragged, seen: Ragged, num_items: int) -> IntArray:
        is_closed_BJ = np.zeros((len(items), num_items), bool)
        is_closed_BJ[:, self.blocked] = True
        for closed in (items, seen, self.full_categories(items)):
            is_closed_BJ[closed.rows, closed.values] = True
        open_B: IntArray = num_items - is_closed_BJ.sum(axis=1)
        return open_B

    def _over_caps(self, items: Ragged) -> dict[str, BoolArray]:
        if self.categories is None:
            return {}
        entries = self.categories.take(items.values)
        pairs = self._categories_of(items).keys(self._num_categories)
        order = np.argsort(pairs, kind="stable")
        _, first, counts = np.unique(pairs[order], return_index=True, return_counts=True)
        is_over = np.zeros(len(items.values), bool)
        is_over[entries.rows[order[np.arange(len(order)) - np.repeat(first, counts) >= self._cap]]] = True
        return {f"more than {self._cap} items of a category": is_over}

    def _categories_of(self, items: Ragged) -> Ragged:
        """The categories of all items of each list, with repeats."""
        assert self.categories is not None
        entries = self.categories.take(items.values)
        return Ragged(entries.values, entries.offsets[items.offsets])

    @property
    def _cap(self) -> int:
        assert self.max_per_category is not None, "categories are set only together with a cap"
        return self.max_per_category

    @functools.cached_property
    def _num_categories(self) -> int:
        assert self.categories is not None
        return int(self.categories.values.max(initial=0)) + 1

    @functools.cached_property
    def _members(self) -> Ragged:
        """The items of each category."""
        assert self.categories is not None
        order = np.argsort(self.categories.values, kind="stable")
        return Ragged.from_rows(self.categories.rows[order], self.categories.values[order], self._num_categories)


@dataclasses.dataclass(frozen=True, eq=False)
class RuleBook:
    """The rules of all days in the indices of one catalog. `on` returns those of one day.

    `always` holds the rules without availability; `first_day` and `last_day` (date ordinals) bound each item of `dated`.
    """

    always: Rules
    num_items: int
    dated: IntArray
    first_day: IntArray
    last_day: IntArray

    @classmethod
    def read(cls, config: RulesConfig, catalog: Catalog) -> RuleBook:
        """Read and check every file. Raises DataError, which names setting, file and line, for a wrong file, and for an
        allow list without any item of the catalog.
        """
        files = {
            setting: _ItemFile.of(read_rule_file(setting, uri), catalog)
            for setting in FILES
            if (uri := getattr(config, setting)) is not None
        }
        removed = _removed(config, files, catalog)
        categories = _categories(files.get("categories"), catalog.num_items)
        boost_J = _boost(files.get("boost"), catalog.num_items)
        always = Rules(
            blocked=_union(removed.values()),
            boost_J=boost_J,
            categories=None if config.max_per_category is None else categories,
            max_per_category=config.max_per_category,
            counts={
                **{f"{rule}_items": len(items) for rule, items in removed.items()},
                "boosted_items": 0 if boost_J is None else int(np.count_nonzero(boost_J)),
                "categorized_items": int((categories.lengths > 0).sum()),
                **{f"unknown_{_UNKNOWN[setting]}_items": files[setting].num_unknown for setting in files},
            },
        )
        return cls(always, catalog.num_items, *_windows(files.get("availability")))

    def on(self, day: datetime.date) -> Rules:
        """The rules of one day. An item without dates is available on every day."""
        ordinal = day.toordinal()
        unavailable = self.dated[(ordinal < self.first_day) | (ordinal > self.last_day)]
        blocked = _union([self.always.blocked, unavailable])
        counts = {**self.always.counts, "unavailable_items": len(unavailable), "blocked_items": len(blocked)}
        return dataclasses.replace(self.always, blocked=blocked, counts=counts)


def read_rules(config: RulesConfig, catalog: Catalog, day: datetime.date) -> Rules:
    """The rules of one day. Raises DataError like `RuleBook.read`, and if the rules leave no item to recommend."""
    rules = RuleBook.read(config, catalog).on(day)
    if len(rules.blocked) == catalog.num_items:
        raise DataError(
            f"score.rules leaves none of {catalog.num_items} items to recommend on {day} "
            f"({', '.join(f'{name} {count}' for name, count in rules.counts.items() if count)}); loosen a rule"
        )
    return rules


def rules_digest(config: RulesConfig) -> str:
    """sha256 of the settings and of the files' bytes (not their names), for a run's id. Raises DataError if a file cannot
    be read.
    """
    contents = {
        setting: hashlib.sha256(read_content(setting, uri)).hexdigest()
        for setting in FILES
        if (uri := getattr(config, setting)) is not None
    }
    return files.digest_of({**config.model_dump(), **contents})


@dataclasses.dataclass(frozen=True)
class _ItemFile:
    """A rule file, and the positions of its items in the catalog."""

    file: RuleFile
    items: IntArray
    """The item index of each row of the file, -1 if unknown."""

    @classmethod
    def of(cls, file: RuleFile, catalog: Catalog) -> _ItemFile:
        return cls(file, catalog.item_map(file.item_ids))

    @property
    def is_known(self) -> BoolArray:
        is_known: BoolArray = self.items >= 0
        return is_known

    @property
    def known(self) -> IntArray:
        """Distinct indices of the known items, ascending."""
        return np.unique(self.items[self.is_known])

    @property
    def num_unknown(self) -> int:
        return len({self.file.item_ids[row] for row in np.flatnonzero(~self.is_known)})


def _removed(config: RulesConfig, files: dict[str, _ItemFile], catalog: Catalog) -> dict[str, IntArray]:
    """The items that each rule blocks on every day."""
    nothing = np.empty(0, np.int64)
    deny, allow = files.get("deny"), files.get("allow")
    if allow is not None and not allow.is_known.any():
        raise DataError(
            f"score.rules.allow names {config.allow}, which holds no item of the catalog, so nothing could be recommended; "
            "correct its item ids or set it to null"
        )
    return {
        "denied": nothing if deny is None else deny.known,
        "not_allowed": nothing if allow is None else np.setdiff1d(np.arange(catalog.num_items), allow.known),
        # Each pair of user and item counts once in training, so the number of interactions is the number of users.
        "low_support": np.flatnonzero(catalog.item_counts < config.min_support),
    }


def _categories(listed: _ItemFile | None, num_items: int) -> Ragged:
    """The category codes of every item, ascending."""
    if listed is None:
        return Ragged.empty(num_items)
    _, codes = np.unique(np.array(listed.file.columns["category"], object), return_inverse=True)
    pairs = np.stack([listed.items, codes], axis=1)[listed.is_known]
    items, values = np.unique(pairs, axis=0).T
    return Ragged.from_rows(values, items, num_items)


def _boost(listed: _ItemFile | None, num_items: int) -> Float32Array | None:
    if listed is None:
        return None
    listed.file.refuse_repeats()
    boost_J = np.zeros(num_items, np.float32)
    boost_J[listed.items[listed.is_known]] = listed.file.numbers("boost")[listed.is_known]
    return boost_J


def _windows(listed: _ItemFile | None) -> tuple[IntArray, IntArray, IntArray]:
    """The items with dates, and the first and last day of each."""
    if listed is None:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    listed.file.refuse_repeats()
    first, last = listed.file.days("first_date", datetime.date.min), listed.file.days("last_date", datetime.date.max)
    for row in np.flatnonzero(first > last)[:1].tolist():
        listed.file.refuse(row, "has a first_date after its last_date; swap them")
    return listed.items[listed.is_known], first[listed.is_known], last[listed.is_known]


def _union(parts: Iterable[IntArray]) -> IntArray:
    return np.unique(np.concatenate([np.empty(0, np.int64), *parts]))
