"""A made-up click log in UserBehavior's format, with interests that a model can find.

Items lie in categories, categories in topics. A user has two to four categories of interest; a session
stays in one of them, often goes on to an item just after the last one in the category's own order, and
otherwise takes one of its popular items. Interests drift within their topic. So what comes next depends
on the whole history and on its order, while what is popular overall says little.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

__all__ = ["SyntheticLog", "generate_user_behavior"]

MAX_INTERESTS = 4
MIN_EVENTS = 5  # some users stay below the eight that make them eligible, as in real logs
NEW_SESSION_RATE = 0.15  # sessions of about seven events
DRIFT_RATE = 0.15  # of sessions: one interest moves to another category of its topic
EXPLORE_RATE = 0.05  # of events: anything popular, without consequence
FOLLOW_RATE = 0.6  # of a session's later events: one to three items further in the category's order
ITEM_SKEW, CATEGORY_SKEW = 0.7, 0.4  # Zipf exponents within a category and between categories
RANK_OFFSET = 4.0  # flattens the head of the item distribution
CATEGORY_SIZE_SPREAD = 0.35  # of the logarithm of category sizes
FIRST_SECOND = 1_511_539_200  # 2017-11-25, the first day of UserBehavior

# fmt: off
TOPICS = (
    "Coffee", "Camping", "Cycling", "Chess", "Garden", "Sailing", "Pottery", "Running", "Jazz",
    "Baking", "Astronomy", "Fishing", "Climbing", "Knitting", "Piano", "Tea", "Travel", "Yoga",
    "Football", "Cinema", "Painting", "Robotics", "History", "Poetry", "Cooking", "Surfing",
    "Theatre", "Woodwork", "Tennis", "Photo", "Radio", "Skiing", "Sewing", "Birding", "Comics",
    "Dance", "Guitar", "Hiking", "Puzzle", "Railway",
)
# fmt: on
KINDS = ("Starter Kit", "Handbook", "Lamp", "Jacket", "Poster", "Toolbox", "Notebook", "Mug", "Course", "Bag")
# fmt: off
STYLES = (
    "Amber", "Basic", "Classic", "Compact", "Copper", "Deluxe", "Early", "Folding", "Golden",
    "Grand", "Heritage", "Indigo", "Ivory", "Large", "Light", "Lunar", "Modern", "Nordic", "Olive",
    "Pocket", "Quiet", "Royal", "Rustic", "Scarlet", "Silver", "Solar", "Urban", "Vintage",
)
# fmt: on
CATEGORIES_PER_TOPIC = 8


@dataclass(frozen=True, slots=True)
class SyntheticLog:
    """What was written: the log, and the items' titles and topics beside it."""

    path: Path
    items_path: Path
    num_items: int
    num_categories: int
    num_users: int
    num_events: int


@dataclass(frozen=True, slots=True)
class _Catalogue:
    """Items of category c are `first[c] .. first[c] + size[c] - 1`, in the category's own order."""

    first: Int64[np.ndarray, " categories"]
    size: Int64[np.ndarray, " categories"]
    item_cdf: Float64[np.ndarray, " items"]  # c + cumulative share within category c: ascending overall
    category_cdf: Float64[np.ndarray, " categories"]

    def popular_categories(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Int64[np.ndarray, " …"]:
        drawn: Int64[np.ndarray, " …"] = np.searchsorted(self.category_cdf, rng.random(shape), side="right")
        return np.asarray(np.minimum(drawn, len(self.size) - 1))  # the last share may round to just below 1

    def popular_offsets(
        self, rng: np.random.Generator, categories: Int64[np.ndarray, " users"]
    ) -> Int64[np.ndarray, " users"]:
        drawn = np.searchsorted(self.item_cdf, categories + rng.random(len(categories)), side="right")
        return np.asarray(np.clip(drawn - self.first[categories], 0, self.size[categories] - 1))


def generate_user_behavior(
    path: Path,
    *,
    num_items: int = 24_000,
    num_categories: int = 320,
    num_users: int = 12_000,
    mean_events: int = 60,
    seed: int = 0,
) -> SyntheticLog:
    """Write the log to `path`, and `items.csv` (item_id, title, topic) beside it, where prepare finds it.

    The same arguments give the same bytes. Every item id occurs in `items.csv`; a few of the rarest may
    not occur in the log. Raises ValueError for sizes that leave a category or a user empty.
    """
    if num_items < 4 * num_categories or num_categories < 1 or num_users < 1 or mean_events <= MIN_EVENTS:
        raise ValueError(
            f"needs num_items >= 4 * num_categories, at least one user and mean_events > {MIN_EVENTS}"
        )
    rng = np.random.default_rng(seed)
    catalogue = _make_catalogue(rng, num_items, num_categories)
    lengths = MIN_EVENTS + rng.gamma(2.0, (mean_events - MIN_EVENTS) / 2, num_users).astype(np.int64)
    items, seconds = _walk(rng, catalogue, lengths)

    # As in the real file: ids are neither dense nor in any order of meaning.
    item_ids = rng.permutation(np.sort(rng.choice(10 * num_items, num_items, replace=False)) + 1)
    user_ids = np.sort(rng.choice(10 * num_users, num_users, replace=False)) + 1
    category_of_item = np.repeat(np.arange(num_categories), catalogue.size)
    category_ids = rng.permutation(10 * num_categories)[:num_categories] + 1
    behaviours = np.array(["pv", "cart", "fav", "buy"])[rng.choice(4, len(items), p=[0.9, 0.05, 0.03, 0.02])]

    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(
        {
            "user": np.repeat(user_ids, lengths),
            "item": item_ids[items],
            "category": category_ids[category_of_item[items]],
            "behaviour": behaviours,
            "second": seconds,
        }
    ).write_csv(path, include_header=False)
    items_path = path.with_name("items.csv")
    _titles(item_ids, category_of_item, catalogue).write_csv(items_path)
    return SyntheticLog(path, items_path, num_items, num_categories, num_users, len(items))


def _make_catalogue(rng: np.random.Generator, num_items: int, num_categories: int) -> _Catalogue:
    shares = rng.lognormal(0.0, CATEGORY_SIZE_SPREAD, num_categories)
    spare = num_items - 4 * num_categories
    edges = np.round(np.cumsum(shares) / shares.sum() * spare).astype(np.int64)
    size = np.diff(edges, prepend=0) + 4
    first = np.concatenate([[0], np.cumsum(size)[:-1]])
    category = np.repeat(np.arange(num_categories), size)

    rank = np.lexsort((rng.random(num_items), category)).argsort() - first[category]
    weight = (rank + RANK_OFFSET) ** -ITEM_SKEW
    running = np.cumsum(weight)
    before = (running - weight)[first]
    total = np.add.reduceat(weight, first)
    item_cdf = category + (running - before[category]) / total[category]

    category_weight = (rng.permutation(num_categories) + RANK_OFFSET) ** -CATEGORY_SKEW
    return _Catalogue(first, size, item_cdf, np.cumsum(category_weight) / category_weight.sum())


def _walk(
    rng: np.random.Generator, catalogue: _Catalogue, lengths: Int64[np.ndarray, " users"]
) -> tuple[Int64[np.ndarray, " events"], Int64[np.ndarray, " events"]]:
    """Every user's events at once, one step a column: (items, seconds), user after user."""
    num_users, num_steps = len(lengths), int(lengths.max())
    users = np.arange(num_users)
    items = np.empty((num_users, num_steps), dtype=np.int64)
    seconds = np.empty((num_users, num_steps), dtype=np.int64)

    interests = catalogue.popular_categories(rng, (num_users, MAX_INTERESTS))
    n_interests = rng.integers(2, MAX_INTERESTS + 1, num_users)
    offset = np.zeros(num_users, dtype=np.int64)
    slot = np.zeros(num_users, dtype=np.int64)
    now = FIRST_SECOND + rng.integers(0, 86_400, num_users)
    for step in range(num_steps):
        fresh = rng.random(num_users) < (1.0 if step == 0 else NEW_SESSION_RATE)
        slot = np.where(fresh, rng.integers(0, n_interests), slot)
        drifts = fresh & (rng.random(num_users) < DRIFT_RATE)
        interests[users, slot] = np.where(
            drifts,
            _another_of_topic(rng, interests[users, slot], len(catalogue.size)),
            interests[users, slot],
        )
        category = interests[users, slot]
        follows = ~fresh & (rng.random(num_users) < FOLLOW_RATE)
        following = (offset + rng.integers(1, 4, num_users)) % catalogue.size[category]
        offset = np.where(follows, following, catalogue.popular_offsets(rng, category))

        explores = rng.random(num_users) < EXPLORE_RATE
        elsewhere = catalogue.popular_categories(rng, (num_users,))
        strange = catalogue.first[elsewhere] + catalogue.popular_offsets(rng, elsewhere)
        items[:, step] = np.where(explores, strange, catalogue.first[category] + offset)
        now = now + np.where(fresh, rng.integers(3_600, 43_200, num_users), rng.integers(15, 300, num_users))
        seconds[:, step] = now
    happened = np.arange(num_steps) < lengths[:, None]
    return items[happened], seconds[happened]


def _another_of_topic(
    rng: np.random.Generator, category: Int64[np.ndarray, " users"], num_categories: int
) -> Int64[np.ndarray, " users"]:
    first = category - category % CATEGORIES_PER_TOPIC
    n = np.minimum(CATEGORIES_PER_TOPIC, num_categories - first)
    another: Int64[np.ndarray, " users"] = first + rng.integers(0, n)
    return another


def _titles(
    item_ids: Int64[np.ndarray, " items"], category: Int64[np.ndarray, " items"], catalogue: _Catalogue
) -> pl.DataFrame:
    """Such as "Amber Chess Handbook 3": the topic and the kind are the category's."""
    topic = np.array(TOPICS)[category // CATEGORIES_PER_TOPIC % len(TOPICS)]
    kind = np.array(KINDS)[(category % CATEGORIES_PER_TOPIC) % len(KINDS)]
    offset = np.arange(len(category)) - catalogue.first[category]
    style = np.array(STYLES)[offset % len(STYLES)]
    number = offset // len(STYLES) + 1 + (len(STYLES) * (category // (CATEGORIES_PER_TOPIC * len(TOPICS))))
    return pl.DataFrame(
        {"item_id": item_ids, "style": style, "topic": topic, "kind": kind, "number": number}
    ).select(
        "item_id", title=pl.concat_str(["style", "topic", "kind", "number"], separator=" "), topic="topic"
    )
