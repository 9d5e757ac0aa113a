"""The frontier policies: their parameters, and each as a sequence of stages of one loop (`hnsw.py`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import get_args

from nann.engine.errors import InvalidQuery
from nann.engine.types import Policy, SearchParams

__all__ = ["Stage", "check_params", "level_walk", "stages"]

NO_LIMIT = 2**31 - 1
_MAX_LEVEL_WIDTH = 65536


@dataclass(frozen=True, slots=True)
class Stage:
    """What happens to the candidates that were just scored, and where the walk goes next.

    The best `keep` of them join the pool, which is cut to `capacity`; its best `width` nodes not
    expanded yet become the frontier, whose neighbours at graph level `level` come next; with `admit` > 0
    at most so many of them, chosen by the query's gate. `forget`: first the pool's nodes become the only
    visited ones and none counts as expanded.
    """

    keep: int
    capacity: int
    width: int
    level: int
    forget: bool = False
    admit: int = 0


def stages(params: SearchParams) -> Iterator[Stage]:
    """The stages of one search.

    `best_first` repeats one stage. `level` is NANN's served search (reference/nann.md, "Served"):
    the entry points are cut to t0; one step over level 1 gives the best t1 of old and new; then
    three steps over level 0, each of which lets only its best t2, t3, t4 new nodes join and go on.
    `level_pruned` is the search NANN evaluates (ibid., "Evaluated").
    """
    if params.policy == "level_pruned":
        yield from _pruned(params)
        return
    if params.policy == "best_first":
        # One stage more than steps: the first takes in the starting nodes, which nothing expanded.
        stage = Stage(
            keep=NO_LIMIT, capacity=params.ef, width=params.beam_width, level=0, admit=params.gate_width
        )
        yield from repeat(stage, params.max_steps + 1)
        return
    t0, t1, *ground, _t5 = params.level_topn
    yield Stage(keep=t0, capacity=t0, width=t0, level=1, forget=True)
    yield Stage(keep=NO_LIMIT, capacity=t1, width=t1, level=0, forget=True)
    capacity = t1
    for t in ground:
        capacity += t
        yield Stage(keep=t, capacity=capacity, width=t, level=0)


def check_params(params: SearchParams) -> None:
    """Refuse parameters that mean nothing, whatever the corpus.

    Raises:
        InvalidQuery: names the parameter.
    """
    if params.policy not in get_args(Policy):
        raise InvalidQuery(f"unknown policy {params.policy!r}; known: {', '.join(get_args(Policy))}")
    if params.gate_width < 0 or math.isnan(params.gate_margin):
        raise InvalidQuery("gate_width must be at least 0, and gate_margin a number")
    if params.gate_width and params.policy != "best_first":
        raise InvalidQuery("gate_width belongs to the policy 'best_first'")
    if params.policy == "level":
        _check_widths("level_topn", params.level_topn, 6)
        return
    if params.policy == "level_pruned":
        _check_widths("level_ef", params.level_ef, 3)
    positive: dict[str, tuple[str, ...]] = {"level_pruned": ("level_steps",), "exhaustive": ()}
    for name in positive.get(params.policy, ("ef", "beam_width", "max_steps")):
        if getattr(params, name) < 1:
            raise InvalidQuery(f"{name} must be at least 1, not {getattr(params, name)}")
    if params.policy != "exhaustive" and params.level_topn:
        raise InvalidQuery("level_topn belongs to the policy 'level'")


def level_walk(params: SearchParams, k: int) -> tuple[SearchParams, int]:
    """The parameters that decide a walk by levels, and about how many nodes of level 0 it expands.

    Raises:
        InvalidQuery: the walk is too narrow for k answers.
    """
    if params.policy == "level":
        name, most, expanded = "level_topn[5]", params.level_topn[5], sum(params.level_topn[1:4])
        walked = SearchParams(policy="level", level_topn=params.level_topn)
    else:
        name, most = "level_ef[2]", params.level_ef[2]
        expanded = params.level_ef[1] + (params.level_steps > 1) * params.level_ef[2]
        walked = SearchParams(policy="level_pruned", level_ef=params.level_ef, level_steps=params.level_steps)
    if k > most:
        raise InvalidQuery(f"k is {k}, more than {name} = {most}")
    return walked, expanded


def _check_widths(name: str, widths: tuple[int, ...], length: int) -> None:
    if len(widths) != length or any(not 1 <= width <= _MAX_LEVEL_WIDTH for width in widths):
        words = {3: "three", 6: "six"}[length]
        raise InvalidQuery(f"{name} must be {words} numbers from 1 to {_MAX_LEVEL_WIDTH}, not {list(widths)}")


def _pruned(params: SearchParams) -> Iterator[Stage]:
    """The search that NANN evaluates (reference/nann.md, "Evaluated"): all nodes that enter the pool go on.

    Its frontier is "the new nodes that score at least the pool's worst". A frontier as wide as the pool
    is just that, since all others of the pool were expanded before; equal scores rank by item index as
    everywhere. Between levels the reference leaves open who is visited and who goes on; here it is as in
    the served search: the pool's nodes alone, and all of them.
    """
    ef2, ef1, ef0 = params.level_ef
    yield Stage(keep=NO_LIMIT, capacity=ef2, width=ef2, level=1, forget=True)
    yield Stage(keep=NO_LIMIT, capacity=ef1, width=ef1, level=0, forget=True)
    # The last of them leads nowhere: nothing is expanded after it.
    yield from repeat(Stage(keep=NO_LIMIT, capacity=ef0, width=ef0, level=0), params.level_steps)
