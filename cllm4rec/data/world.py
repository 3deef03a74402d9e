"""Generated data sets with a known truth: a sample world of any size as raw files, and the parity world for tests.

    python -m cllm4rec.data.world --output sample_world --users 2000 --items 600 --seed 0

The sample world has latent topics and styles, item quality, skewed popularity, and texts that reveal topic and style. Some
of its items are new (NEW_ITEM_FRACTION): they have five to eight interactions each, so that a recommender must read their
texts. It has the format of the Amazon 2014 release. It is written one chunk of users at a time, so memory does not grow with
the number of users.

The parity world is the smallest data set with an obvious answer: even users like even items and odd users odd items. Each
user has one liked item in test and one in validation.

Shapes: C users of one chunk, D draws per user, E interactions of one chunk.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged, slices
from cllm4rec.storage.files import filesystem, join, write_bytes
from cllm4rec.typing import Array

USERS_PER_CHUNK = 10_000
FIRST_DAY = 1_356_998_400
"""Unix seconds of the first day of the sample world; it lasts two years and new items appear in its last fifth."""
DAYS = 730
NEW_ITEM_FRACTION = 0.15
NEW_ITEM_INTERACTIONS = (5, 8)
DRAWS = (8, 14)
"""Fewest and most items of a user. After the rating threshold 7 to 8 remain, as in the Amazon data (Beauty has 8.9)."""


@dataclasses.dataclass(frozen=True)
class Topic:
    things: tuple[str, ...]
    deeds: tuple[str, ...]


TOPICS = tuple(
    Topic(tuple(things.split()), tuple(deeds.strip().split(", ")))
    for things, deeds in (
        line.split(":")
        for line in """\
trowel hose planter trellis rake pruner: planting tomatoes, pruning roses, watering the beds, turning compost
skillet whisk ladle griddle saucepan peeler: frying onions, baking bread, stirring soup, slicing carrots
saddle pedal helmet handlebar pannier tyre: riding uphill, commuting by bike, racing on gravel, fixing a puncture
lens tripod shutter flash filter camera: shooting portraits, framing a view, lighting a studio, developing film
tent lantern stove hammock backpack canteen: hiking in the woods, sleeping outdoors, crossing a ridge, lighting a fire
brush easel canvas palette pigment sketchbook: painting in oil, mixing colours, drawing figures, priming a panel
telescope eyepiece finder mount starmap binocular: watching Saturn, finding comets, mapping craters, seeing nebulae
yarn needle loom bobbin thimble pattern: knitting a scarf, mending a sweater, sewing a hem, weaving a blanket
rod reel lure tackle bait waders: casting for trout, fishing at the lake, tying flies, landing a pike
grinder kettle espresso roaster teapot dripper: brewing coffee, pouring a latte, roasting beans, steeping tea
chisel saw plane clamp mallet lathe: carving oak, planing a board, joining a table, turning a bowl
guitar amplifier pedalboard banjo capo strings: strumming chords, recording a solo, tuning by ear, playing the blues
rudder sail anchor compass rope buoy: sailing upwind, mooring in a harbour, crossing the bay, tying knots
aquarium pump heater gravel coral net: keeping tetras, cycling a tank, feeding guppies, growing moss
chessboard clock puzzle dice deck rook: solving endgames, playing a gambit, shuffling cards, hosting game night
sneaker stopwatch insole jersey treadmill headband: running a marathon, sprinting, stretching calves, jogging at dawn
""".splitlines()
    )
)
STYLES = {
    "beginner": ("simple", "gentle", "friendly", "forgiving"),
    "professional": ("precise", "durable", "robust", "heavy-duty"),
    "travel": ("light", "compact", "foldable", "portable"),
    "vintage": ("classic", "retro", "handmade", "nostalgic"),
}
BRANDS = (
    "Alder",
    "Birchwood",
    "Calder",
    "Dunmore",
    "Elmsford",
    "Fairlight",
    "Granby",
    "Harrow",
    "Inverness",
    "Juniper",
)
OPENINGS = (
    "This {adjective} {thing} is what I use for {deed}.",
    "I bought the {thing} for {deed} and it feels {adjective}.",
    "A {adjective} {thing}, made for {deed}.",
    "For {deed} I wanted a {adjective} {thing}.",
    "My {thing} looks {adjective} and I take it along for {deed}.",
)
ASIDES = (
    "I have been {deed} for years.",
    "Next month I will try it while {deed}.",
    "My brother borrowed it for {deed}.",
    "It also helps with {deed}.",
)
VERDICTS = (
    ("It broke within a week.", "I sent it back.", "A waste of money.", "Very disappointed."),
    ("Not worth the price.", "I expected more.", "It does not do the job.", "Poorly made."),
    ("It is all right.", "Neither good nor bad.", "Fine for the price.", "It does what it must."),
    ("Works well and I like it.", "A good buy.", "I am happy with it.", "Nicely made."),
    ("The best I ever had.", "I recommend it to everyone.", "Absolutely love it.", "Perfect in every way."),
)
DESCRIPTIONS = (
    "The {brand} {thing} is a {adjective} choice for {style} use. It is designed for {deed}.",
    "A {adjective} {thing} by {brand}, built with {deed} in mind. Our {style} line.",
    "Enjoy {deed} with this {style} {thing}. {brand} made it {adjective}.",
)
BIOGRAPHIES = (
    "I spend my weekends {deed} and sometimes {other}. I look for {style} gear that is {adjective}.",
    "Fond of {deed}, and of {other} too. I prefer {adjective} things in a {style} style.",
    "Most evenings I am {deed}; now and then I enjoy {other}. For me it has to be {style} and {adjective}.",
)
TITLE = "{brand} {adjective} {thing}, {style}"


@dataclasses.dataclass(frozen=True)
class _Phrases:
    """All sentences of the reviews, as arrays of strings indexed by what they describe."""

    openings: Array  # topic, thing, style, variant
    asides: Array  # topic, variant
    verdicts: Array  # rating - 1, variant

    @classmethod
    def build(cls) -> _Phrases:
        openings = [
            [
                [
                    _expand(OPENINGS, thing=[thing], adjective=adjectives, deed=topic.deeds)
                    for adjectives in STYLES.values()
                ]
                for thing in topic.things
            ]
            for topic in TOPICS
        ]
        asides = [_expand(ASIDES, deed=topic.deeds) for topic in TOPICS]
        return cls(np.array(openings, object), np.array(asides, object), np.array(VERDICTS, object))


def _expand(templates: Iterable[str], **slots: Iterable[str]) -> list[str]:
    fillings = [dict(zip(slots, values, strict=True)) for values in itertools.product(*slots.values())]
    return [template.format(**filling) for template in templates for filling in fillings]


@dataclasses.dataclass(frozen=True)
class _Items:
    """The items of a sample world: topic, style, quality and popularity.

    Regular items are drawn by cell (topic and style). New items go to a few users who like their topic.
    """

    topic: Array
    style: Array
    thing: Array
    quality: Array
    is_new: Array
    by_cell: Array
    """Regular items, sorted by cell."""
    mass: Array
    """Cumulative popularity along `by_cell`, from 0."""
    cell_start: Array
    """Where each cell begins in `by_cell`, and the end of the last."""

    @classmethod
    def draw(cls, num_items: int, rng: np.random.Generator) -> _Items:
        topic = rng.integers(len(TOPICS), size=num_items)
        style = rng.integers(len(STYLES), size=num_items)
        thing = rng.integers(len(TOPICS[0].things), size=num_items)
        quality = rng.normal(size=num_items)
        is_new = rng.permutation(num_items) < int(num_items * NEW_ITEM_FRACTION)
        cell = topic * len(STYLES) + style
        regular = np.flatnonzero(~is_new)
        by_cell = regular[np.argsort(cell[regular], kind="stable")]
        popularity = np.exp(0.5 * rng.normal(size=num_items) + 0.4 * quality)
        mass = np.concatenate([[0.0], np.cumsum(popularity[by_cell])])
        cell_start = np.searchsorted(cell[by_cell], np.arange(len(TOPICS) * len(STYLES) + 1))
        return cls(topic, style, thing, quality, is_new, by_cell, mass, cell_start)

    def pick(self, topic: Array, style: Array, rng: np.random.Generator) -> Array:
        """One regular item for each topic and style, by popularity."""
        cell = topic * len(STYLES) + style
        low, high = self.mass[self.cell_start[cell]], self.mass[self.cell_start[cell + 1]]
        place = np.searchsorted(self.mass, low + rng.random(cell.shape) * (high - low), side="right") - 1
        picked: Array = self.by_cell[np.minimum(place, len(self.by_cell) - 1)]
        return picked


@dataclasses.dataclass(frozen=True)
class _Fans:
    """The users of the new items, drawn before the chunks of users are written. Sorted by user."""

    user: Array
    item: Array

    @classmethod
    def draw(cls, items: _Items, first_topic: Array, rng: np.random.Generator) -> _Fans:
        new = np.flatnonzero(items.is_new)
        low, high = NEW_ITEM_INTERACTIONS
        item = np.repeat(new, rng.integers(low, high + 1, size=len(new)))
        by_topic = np.argsort(first_topic, kind="stable")
        start = np.searchsorted(first_topic[by_topic], np.arange(len(TOPICS) + 1))
        wanted = items.topic[item]
        place = start[wanted] + (rng.random(len(item)) * (start[wanted + 1] - start[wanted])).astype(np.int64)
        pairs = np.unique(np.stack([by_topic[np.minimum(place, len(by_topic) - 1)], item], axis=1), axis=0)
        return cls(pairs[:, 0], pairs[:, 1])

    def of_users(self, first: int, last: int) -> tuple[Array, Array]:
        """User and item of the rows of users first..last-1."""
        low, high = np.searchsorted(self.user, [first, last])
        return self.user[low:high], self.item[low:high]


@dataclasses.dataclass(frozen=True)
class _Tastes:
    """The preferences of the users of one chunk: two topics and a style."""

    first: Array
    second: Array
    style: Array

    @classmethod
    def draw(cls, first_topic: Array, rng: np.random.Generator) -> _Tastes:
        first = first_topic.astype(np.int64)
        second = (first + rng.integers(1, len(TOPICS), size=len(first))) % len(TOPICS)
        return cls(first, second, rng.integers(len(STYLES), size=len(first)))


def sample_world(directory: str, num_users: int = 2000, num_items: int = 600, seed: int = 0) -> None:
    """Write `reviews.json.gz` (reviewerID, asin, reviewText, overall, unixReviewTime), `items.jsonl.gz` (asin, title,
    description) and `users.jsonl.gz` (reviewerID, biography) to a local folder or fsspec URI.

    The same arguments give the same bytes. Memory grows by one byte per user.
    """
    rng = np.random.default_rng([seed, 0])
    items = _Items.draw(num_items, rng)
    # Some topics are more popular than others.
    shares = rng.dirichlet(np.full(len(TOPICS), 8.0))
    first_topic = rng.choice(len(TOPICS), size=num_users, p=shares).astype(np.int8)
    fans = _Fans.draw(items, first_topic, rng)
    _write_gzip(join(directory, "items.jsonl.gz"), [_item_lines(items, rng)])
    phrases = _Phrases.build()
    chunks = [range(part.start, part.stop) for part in slices(num_users, USERS_PER_CHUNK)]

    def user_lines() -> Iterator[str]:
        for number, users in enumerate(chunks):
            yield _user_lines(users, *_tastes_of(users, number))

    def review_lines() -> Iterator[str]:
        for number, users in enumerate(chunks):
            yield _review_lines(users, *_tastes_of(users, number), items, fans, phrases)

    def _tastes_of(users: range, number: int) -> tuple[_Tastes, np.random.Generator]:
        own = np.random.default_rng([seed, 1, number])
        return _Tastes.draw(first_topic[users.start : users.stop], own), own

    _write_gzip(join(directory, "users.jsonl.gz"), user_lines())
    _write_gzip(join(directory, "reviews.json.gz"), review_lines())


def _item_lines(items: _Items, rng: np.random.Generator) -> str:
    lines = []
    for index, (topic, style, thing) in enumerate(zip(items.topic, items.style, items.thing, strict=True)):
        style_name, adjectives = list(STYLES.items())[style]
        slots = {
            "brand": rng.choice(BRANDS),
            "thing": TOPICS[topic].things[thing],
            "deed": rng.choice(TOPICS[topic].deeds),
            "style": style_name,
        }
        title = TITLE.format(adjective=rng.choice(adjectives), **slots)
        description = str(rng.choice(DESCRIPTIONS)).format(adjective=rng.choice(adjectives), **slots)
        lines.append(json.dumps({"asin": _item_id(index), "title": title, "description": description}) + "\n")
    return "".join(lines)


def _user_lines(users: range, tastes: _Tastes, rng: np.random.Generator) -> str:
    deeds = np.array([topic.deeds for topic in TOPICS], object)
    styles = np.array(list(STYLES), object)
    adjectives = np.array(list(STYLES.values()), object)
    draw = rng.integers(len(adjectives[0]), size=(4, len(users)))
    templates = np.array(BIOGRAPHIES, object)[rng.integers(len(BIOGRAPHIES), size=len(users))]
    columns = zip(
        users,
        templates,
        deeds[tastes.first, draw[0]],
        deeds[tastes.second, draw[1]],
        styles[tastes.style],
        adjectives[tastes.style, draw[2]],
        strict=True,
    )
    return "".join(
        f'{{"reviewerID": "{_user_id(user)}", "biography": "'
        f'{template.format(deed=deed, other=other, style=style, adjective=adjective)}"}}\n'
        for user, template, deed, other, style, adjective in columns
    )


def _review_lines(
    users: range, tastes: _Tastes, rng: np.random.Generator, items: _Items, fans: _Fans, phrases: _Phrases
) -> str:
    user_E, item_E = _interactions(users, tastes, items, fans, rng)
    rating_E = _ratings(user_E, item_E, tastes, items, rng)
    time_E = _times(items.is_new[item_E], rng)
    order = np.lexsort((time_E, user_E))
    user_E, item_E, rating_E, time_E = user_E[order], item_E[order], rating_E[order], time_E[order]
    # No sentence contains a character that JSON would escape, so lines are concatenated: json.dumps is far slower.
    columns = zip(
        user_E + users.start,
        item_E,
        _review_texts(item_E, rating_E, items, phrases, rng),
        rating_E,
        time_E,
        strict=True,
    )
    return "".join(
        f'{{"reviewerID": "{_user_id(user)}", "asin": "{_item_id(item)}", "reviewText": "{text}", '
        f'"overall": {rating}.0, "unixReviewTime": {time}}}\n'
        for user, item, text, rating, time in columns
    )


def _interactions(
    users: range, tastes: _Tastes, items: _Items, fans: _Fans, rng: np.random.Generator
) -> tuple[Array, Array]:
    """User (numbered from the chunk's first) and item of every interaction, without repeats."""
    num_users, most = len(users), DRAWS[1]
    which = rng.random((num_users, most))
    anything = rng.integers(len(TOPICS), size=(num_users, most))
    topic_CD = np.where(which < 0.4, tastes.first[:, None], np.where(which < 0.7, tastes.second[:, None], anything))
    own_style = rng.random((num_users, most)) < 0.35
    style_CD = np.where(own_style, tastes.style[:, None], rng.integers(len(STYLES), size=(num_users, most)))
    taken = np.arange(most) < rng.integers(DRAWS[0], most + 1, size=num_users)[:, None]
    user_E, item_E = np.nonzero(taken)[0], items.pick(topic_CD, style_CD, rng)[taken]
    fan_user, fan_item = fans.of_users(users.start, users.stop)
    pairs = np.concatenate([user_E * len(items.topic) + item_E, (fan_user - users.start) * len(items.topic) + fan_item])
    return np.divmod(np.unique(pairs), len(items.topic))


def _ratings(user_E: Array, item_E: Array, tastes: _Tastes, items: _Items, rng: np.random.Generator) -> Array:
    """Ratings from 1 to 5 by match of topic and style and by quality. New items are liked by all their users."""
    topic_E = items.topic[item_E]
    liked_topic = (topic_E == tastes.first[user_E]) | (topic_E == tastes.second[user_E])
    liked_style = items.style[item_E] == tastes.style[user_E]
    match = 1.2 * liked_topic + 0.5 * liked_style
    score = 2.7 + match + 0.4 * items.quality[item_E] + 0.6 * rng.normal(size=len(item_E))
    score = np.where(items.is_new[item_E], np.maximum(score, 4), score)
    return np.asarray(np.clip(np.rint(score), 1, 5), np.int64)


def _times(is_new_E: Array, rng: np.random.Generator) -> Array:
    day = rng.integers(DAYS, size=len(is_new_E))
    return FIRST_DAY + 86_400 * np.where(is_new_E, DAYS - 1 - day // 5, day)


def _review_texts(
    item_E: Array, rating_E: Array, items: _Items, phrases: _Phrases, rng: np.random.Generator
) -> Iterator[str]:
    topic_E, num_reviews = items.topic[item_E], len(item_E)
    openings, asides, verdicts = phrases.openings, phrases.asides, phrases.verdicts
    opening = openings[
        topic_E, items.thing[item_E], items.style[item_E], rng.integers(openings.shape[-1], size=num_reviews)
    ]
    aside = asides[topic_E, rng.integers(asides.shape[-1], size=num_reviews)]
    verdict = verdicts[rating_E - 1, rng.integers(verdicts.shape[-1], size=num_reviews)]
    talkative = rng.random(num_reviews) < 0.4
    return (
        f"{first} {second} {last}" if long else f"{first} {last}"
        for first, second, last, long in zip(opening, aside, verdict, talkative, strict=True)
    )


def _user_id(user: int) -> str:
    return f"A{user:09d}"


def _item_id(item: int) -> str:
    return f"B{item:07d}"


def _write_gzip(uri: str, chunks: Iterable[str]) -> None:
    """Write under a temporary name and rename. The gzip header has no time and no name: equal content gives equal bytes."""
    fs, path = filesystem(uri)
    fs.makedirs(fs._parent(path), exist_ok=True)
    with (
        fs.open(f"{path}.partial", "wb") as stream,
        gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=stream, mtime=0) as packed,
    ):
        for chunk in chunks:
            packed.write(chunk.encode())
    fs.mv(f"{path}.partial", path)


@dataclasses.dataclass(frozen=True)
class ParityWorld:
    """Users `user-00`, ... and items `item-00`, ...: index i has number i, and users like items of their parity."""

    histories: Histories
    catalog: Catalog

    @property
    def num_users(self) -> int:
        return self.catalog.num_users

    @property
    def num_items(self) -> int:
        return self.catalog.num_items

    def review(self, user: int, item: int) -> str:
        """The review of an item by a user. Its words reveal the parity of the item and nothing else."""
        return f"{_PARITY_WORDS[item % 2]} and {_MOODS[(user + item) % len(_MOODS)]}"

    def reviews(self) -> tuple[Array, Array, list[str]]:
        """User, item and text of each training pair."""
        user, item = self.histories.user[self.histories.train.rows], self.histories.train.values
        return user, item, [self.review(int(one), int(other)) for one, other in zip(user, item, strict=True)]

    def write(self, directory: str) -> None:
        """Raw `interactions.jsonl` (user, item, rating, text, timestamp), `items.jsonl` (item, text) and `users.jsonl`
        (user, text). Prepared with split kind leave_one_out and a core of 1 to 5, they give these histories."""
        catalog, everything = self.catalog, self.histories.together("train", "validation", "test")
        _write_jsonl(
            join(directory, "items.jsonl"), zip(catalog.item_ids, catalog.item_texts, strict=True), ("item", "text")
        )
        _write_jsonl(
            join(directory, "users.jsonl"), zip(catalog.user_ids, catalog.user_texts, strict=True), ("user", "text")
        )
        rows = zip(everything.rows, everything.values, everything.places, strict=True)
        _write_jsonl(
            join(directory, "interactions.jsonl"),
            (
                (
                    catalog.user_ids[user],
                    catalog.item_ids[item],
                    5.0,
                    self.review(int(user), int(item)),
                    1000 + int(time),
                )
                for user, item, time in rows
            ),
            ("user", "item", "rating", "text", "timestamp"),
        )


_PARITY_WORDS = ("smooth round and even", "sharp edged and odd")
_MOODS = ("fine", "nice", "lovely", "pretty", "pleasant")


def parity_world(num_users: int = 40, num_items: int = 20) -> ParityWorld:
    """Even users like all even items and odd users all odd items; each user has one in test and one in validation.

    The held-out items rotate through the catalog, so popularity does not reveal them.
    """
    liked = [np.arange(user % 2, num_items, 2) for user in range(num_users)]
    turned = [np.roll(items, -(user // 2)) for user, items in enumerate(liked)]
    histories = Histories(
        np.arange(num_users, dtype=np.int64),
        Ragged.from_lists([items[:-2] for items in turned]),
        Ragged.from_lists([items[-2:-1] for items in turned]),
        Ragged.from_lists([items[-1:] for items in turned]),
    )
    digits = len(str(max(num_users, num_items) - 1))
    catalog = Catalog(
        [f"user-{user:0{digits}d}" for user in range(num_users)],
        [f"item-{item:0{digits}d}" for item in range(num_items)],
        [f"likes what is {_PARITY_WORDS[user % 2]}" for user in range(num_users)],
        [f"a thing that is {_PARITY_WORDS[item % 2]}" for item in range(num_items)],
        np.bincount(histories.train.values, minlength=num_items).tolist(),
    )
    return ParityWorld(histories, catalog)


def _write_jsonl(uri: str, rows: Iterable[tuple[Any, ...]], names: tuple[str, ...]) -> None:
    lines = [json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows]
    write_bytes(uri, "".join(lines).encode())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="write a sample world as raw files of the Amazon 2014 shape")
    parser.add_argument("--output", required=True, help="folder or fsspec URI to write to")
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--items", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    sample_world(flags.output, flags.users, flags.items, flags.seed)
    print(f"wrote reviews.json.gz, items.jsonl.gz and users.jsonl.gz to {flags.output}")


if __name__ == "__main__":
    main()
