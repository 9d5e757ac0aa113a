"""The two frontier policies, as sequences of stages of one loop (`hnsw.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

from nann.engine.types import SearchParams

__all__ = ["Stage", "stages"]

NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Stage:
    """What happens to the candidates that were just scored, and where the walk goes next.

    The best `keep` of them join the pool, which is cut to `capacity`; its best `width` nodes not
    expanded yet become the frontier, whose neighbours at graph level `level` come next. `forget`:
    first the pool's nodes become the only visited ones and none counts as expanded.
    """

    keep: int
    capacity: int
    width: int
    level: int
    forget: bool = False


def stages(params: SearchParams) -> Iterator[Stage]:
    """The stages of one search.

    `best_first` repeats one stage. `level` is NANN's served search (reference/nann.md, "Served"):
    the entry points are cut to t0; one step over level 1 gives the best t1 of old and new; then
    three steps over level 0, each of which lets only its best t2, t3, t4 new nodes join and go on.
    """
    if params.policy == "best_first":
        # One stage more than steps: the first takes in the starting nodes, which nothing expanded.
        yield from repeat(
            Stage(keep=NO_LIMIT, capacity=params.ef, width=params.beam_width, level=0), params.max_steps + 1
        )
        return
    t0, t1, *ground, _t5 = params.level_topn
    yield Stage(keep=t0, capacity=t0, width=t0, level=1, forget=True)
    yield Stage(keep=NO_LIMIT, capacity=t1, width=t1, level=0, forget=True)
    capacity = t1
    for t in ground:
        capacity += t
        yield Stage(keep=t, capacity=capacity, width=t, level=0)
