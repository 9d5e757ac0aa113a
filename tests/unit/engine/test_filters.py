"""Attribute predicates: every operator against plain Python, nulls, errors, the cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from nann.engine.errors import InvalidQuery
from nann.engine.filters import MAX_VALUES, FilterCache

YEARS = [1990, None, 2001, 1985, 1990, None]
TITLES = ["Up", "Heat", None, "Alien", "Up", "Ran"]
PRICES = [1.5, 2.0, None, 0.0, -1.0, 2.0]
ADULT = [True, False, None, False, True, None]
GENRES = [["a"], ["a", "b"], [], None, ["b"], ["c", None]]
TABLE = pl.DataFrame({"year": YEARS, "title": TITLES, "price": PRICES, "adult": ADULT, "genres": GENRES})


def admitted(predicate: dict[str, Any]) -> list[bool]:
    return FilterCache(TABLE).mask(predicate).tolist()


def where(values: list[Any], holds: Callable[[Any], bool], null: bool = False) -> list[bool]:
    return [null if value is None else holds(value) for value in values]


@pytest.mark.parametrize(
    ("predicate", "wanted"),
    [
        ({"year": 1990}, where(YEARS, lambda y: y == 1990)),
        ({"year": {"eq": 1990}}, where(YEARS, lambda y: y == 1990)),
        ({"year": {"ne": 1990}}, where(YEARS, lambda y: y != 1990, null=True)),
        ({"year": [1985, 2001]}, where(YEARS, lambda y: y in (1985, 2001))),
        ({"year": (1985,)}, where(YEARS, lambda y: y == 1985)),
        ({"year": {"in": [1985, 2001]}}, where(YEARS, lambda y: y in (1985, 2001))),
        ({"year": {"nin": [1985, 2001]}}, where(YEARS, lambda y: y not in (1985, 2001), null=True)),
        ({"year": {"in": []}}, [False] * 6),
        ({"year": {"nin": []}}, [True] * 6),
        ({"year": {"gt": 1990}}, where(YEARS, lambda y: y > 1990)),
        ({"year": {"gte": 1990}}, where(YEARS, lambda y: y >= 1990)),
        ({"year": {"lt": 1990}}, where(YEARS, lambda y: y < 1990)),
        ({"year": {"lte": 1990}}, where(YEARS, lambda y: y <= 1990)),
        ({"year": {"gte": 1985, "lt": 2000}}, where(YEARS, lambda y: 1985 <= y < 2000)),
        ({"year": {"gt": 1989.5}}, where(YEARS, lambda y: y > 1989.5)),
        ({"title": "Up"}, where(TITLES, lambda t: t == "Up")),
        ({"title": {"in": ["Up", "Ran"]}}, where(TITLES, lambda t: t in ("Up", "Ran"))),
        ({"title": {"gte": "Ran"}}, where(TITLES, lambda t: t >= "Ran")),
        ({"title": {"ne": "Up"}}, where(TITLES, lambda t: t != "Up", null=True)),
        ({"price": 2}, where(PRICES, lambda p: p == 2)),
        ({"price": {"lte": -0.5}}, where(PRICES, lambda p: p <= -0.5)),
        ({"adult": True}, where(ADULT, bool)),
        ({"adult": {"ne": True}}, where(ADULT, lambda a: not a, null=True)),
        ({"genres": {"contains": "b"}}, where(GENRES, lambda g: "b" in g)),
        ({"genres": {"contains": "z"}}, [False] * 6),
        ({"year": 1990, "title": "Up"}, [True, False, False, False, True, False]),
        ({"year": 1990, "price": {"gt": 0}}, [True, False, False, False, False, False]),
        ({"year": 2**63}, [False] * 6),
        ({"year": {"lt": 2**64 - 1}}, where(YEARS, lambda y: True)),
    ],
)
def test_what_a_filter_admits(predicate, wanted) -> None:
    assert admitted(predicate) == wanted


def test_no_condition_depends_on_the_order_of_conditions() -> None:
    one = {"year": {"gte": 1985, "lt": 2000}, "title": {"ne": "Up"}}
    other = {"title": {"ne": "Up"}, "year": {"lt": 2000, "gte": 1985}}
    assert admitted(one) == admitted(other)


@pytest.mark.parametrize(
    ("predicate", "match"),
    [
        ({}, "no condition"),
        ({"colour": 1}, "unknown attribute 'colour'; known: year, title, price, adult, genres"),
        ({"year": {}}, "'year' has no operator"),
        ({"year": {"like": 1}}, "unknown operator 'like' on 'year'"),
        ({"year": {"$gt": 1}}, r"unknown operator '\$gt'"),
        ({"year": None}, "not NoneType"),
        ({"year": {"gt": None}}, "not NoneType"),
        ({"year": {"gt": [1]}}, "not list"),
        ({"year": {"eq": {"a": 1}}}, "not dict"),
        ({"year": {"in": 3}}, "takes a list"),
        ({"title": {"in": "Up"}}, "takes a list"),
        ({"title": {"nin": "Up"}}, "takes a list"),
        ({"year": {"in": [None]}}, "not NoneType"),
        ({"year": [[1990]]}, "not list"),
        ({"year": {"in": list(range(MAX_VALUES + 1))}}, f"at most {MAX_VALUES}"),
        ({"year": "1990"}, "does not fit"),
        ({"title": 3}, "does not fit"),
        ({"title": {"lt": 3}}, "does not fit"),
        ({"title": {"contains": "U"}}, "does not fit"),
        ({"genres": "a"}, "does not fit"),
        ({"genres": {"contains": 1}}, "does not fit"),
        ({"year": {"in": [1, "a"]}}, "does not fit"),
        ({"year": {"in": [True, 2]}}, "does not fit"),
        ({"title": {"in": [1, 2]}}, "does not fit"),
        ({"year": 2**64}, "filter: "),
        ({"year": {"lt": float("inf")}}, "finite"),
        ({"year": {"in": [1.0, float("nan")]}}, "finite"),
        ({1: 2}, "filter: "),
        ({"title": "\ud800"}, "filter: "),
        ({"title": b"Up"}, "filter: "),
        ({"title": {"Up"}}, "filter: "),
    ],
)
def test_what_is_wrong_with_a_filter_is_said(predicate, match) -> None:
    with pytest.raises(InvalidQuery, match=match):
        FilterCache(TABLE).mask(predicate)


def test_a_model_without_attributes_refuses_filters() -> None:
    with pytest.raises(InvalidQuery, match="no item attributes"):
        FilterCache(None).mask({"year": 1990})


def test_a_thousand_values_are_allowed() -> None:
    assert admitted({"year": list(range(1000, 1000 + MAX_VALUES))}) == where(YEARS, lambda y: y < 2000)


def test_masks_are_reused_and_bounded() -> None:
    cache = FilterCache(TABLE)
    first = cache.mask({"year": 1990, "title": "Up"})
    assert cache.mask({"title": "Up", "year": 1990}) is first
    for year in range(63):
        cache.mask({"year": year})
    assert cache.mask({"title": "Up", "year": 1990}) is first
    for year in range(100, 164):
        cache.mask({"year": year})
    assert len(cache._masks) == 64
    again = cache.mask({"year": 1990, "title": "Up"})
    assert again is not first
    np.testing.assert_array_equal(again, first)


def test_predicates_that_look_alike_are_not_mixed_up() -> None:
    cache = FilterCache(TABLE)
    assert cache.mask({"price": 0}).tolist() == where(PRICES, lambda p: p == 0)
    assert cache.mask({"adult": {"ne": False}}).tolist() == where(ADULT, bool, null=True)
    assert cache.mask({"adult": False}).tolist() == where(ADULT, lambda a: not a)
    for wrong in (float("inf"), float("-inf"), float("nan"), None):  # JSON spells them all null
        with pytest.raises(InvalidQuery):
            cache.mask({"price": {"gt": wrong}})


def test_one_cache_serves_several_threads() -> None:
    cache = FilterCache(TABLE)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for year in rng.choice([1985, 1990, 2001, *range(80)], 150).tolist():
            if cache.mask({"year": year}).tolist() != where(YEARS, lambda y, year=year: y == year):
                wrong.append(year)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
