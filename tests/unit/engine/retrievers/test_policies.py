"""The stages of the frontier policies."""

from __future__ import annotations

import pytest

from nann.engine.retrievers.policies import NO_LIMIT, Stage, stages
from nann.engine.types import SearchParams


@pytest.mark.parametrize("max_steps", [1, 2, 64])
def test_best_first_repeats_one_stage_once_for_the_start_and_once_a_step(max_steps) -> None:
    found = list(stages(SearchParams(ef=30, beam_width=7, max_steps=max_steps)))
    assert found == [Stage(keep=NO_LIMIT, capacity=30, width=7, level=0)] * (max_steps + 1)


def test_level_has_the_five_stages_of_nanns_served_search() -> None:
    found = list(stages(SearchParams(policy="level", level_topn=(1, 2, 3, 4, 5, 6))))
    assert found == [
        Stage(keep=1, capacity=1, width=1, level=1, forget=True),
        Stage(keep=NO_LIMIT, capacity=2, width=2, level=0, forget=True),
        Stage(keep=3, capacity=5, width=3, level=0),
        Stage(keep=4, capacity=9, width=4, level=0),
        Stage(keep=5, capacity=14, width=5, level=0),
    ]


def test_level_pruned_expands_all_of_its_pool_that_is_new() -> None:
    found = list(stages(SearchParams(policy="level_pruned", level_ef=(4, 5, 6), level_steps=2)))
    assert found == [
        Stage(keep=NO_LIMIT, capacity=4, width=4, level=1, forget=True),
        Stage(keep=NO_LIMIT, capacity=5, width=5, level=0, forget=True),
        Stage(keep=NO_LIMIT, capacity=6, width=6, level=0),
        Stage(keep=NO_LIMIT, capacity=6, width=6, level=0),
    ]


def test_level_pruned_is_by_default_what_nann_evaluates() -> None:
    found = list(stages(SearchParams(policy="level_pruned")))
    assert [(stage.capacity, stage.level) for stage in found] == [(100, 1), (200, 0), *[(400, 0)] * 3]
