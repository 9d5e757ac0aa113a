from __future__ import annotations

import pytest

from nann.engine.errors import InvalidQuery
from nann.engine.types import SearchParams
from nann.service.params import result_size, search_params
from nann.service.settings import Settings
from nann.service.types import ParamOverrides

TOPN = (100, 200, 200, 200, 200, 150)
BALANCED = SearchParams(ef=300, beam_width=64)
PROFILES = {
    "balanced": BALANCED,
    "fast": SearchParams(ef=100, beam_width=16, max_steps=20),
    "exact": SearchParams(policy="exhaustive"),
    "nann": SearchParams(policy="level", level_topn=TOPN),
    "evaluated": SearchParams(policy="level_pruned", level_ef=(5, 10, 20), level_steps=2),
}
SETTINGS = Settings(repository="r", max_ef=2000, max_beam_width=512, max_steps_limit=100)


def resolve(overrides: ParamOverrides | None = None, profile: str | None = None) -> SearchParams:
    return search_params(overrides, profile, profiles=PROFILES, default=BALANCED, settings=SETTINGS)


def test_nothing_said_is_the_default() -> None:
    assert resolve() == BALANCED
    assert resolve(ParamOverrides()) == BALANCED


def test_a_profile_is_taken_as_it_is_and_params_lie_over_it() -> None:
    assert resolve(profile="fast") == PROFILES["fast"]
    assert resolve(ParamOverrides(ef=150), "fast") == SearchParams(ef=150, beam_width=16, max_steps=20)
    assert resolve(ParamOverrides(policy="best_first"), "exact").policy == "best_first"
    assert resolve(ParamOverrides(policy="exhaustive"), "fast") == SearchParams(policy="exhaustive")


def test_level_topn_alone_means_level_and_keeps_nothing_of_another_policy() -> None:
    expected = SearchParams(policy="level", level_topn=TOPN)
    assert resolve(ParamOverrides(level_topn=TOPN)) == expected
    assert resolve(ParamOverrides(level_topn=TOPN), "fast") == expected
    assert resolve(ParamOverrides(policy="level"), "nann") == expected


def test_level_pruned_has_nanns_parameters_or_those_of_a_profile() -> None:
    assert resolve(ParamOverrides(policy="level_pruned")) == SearchParams(policy="level_pruned")
    assert resolve(ParamOverrides(policy="level_pruned"), "evaluated") == PROFILES["evaluated"]


@pytest.mark.parametrize(
    ("overrides", "profile", "message"),
    [
        (None, "fastest", "unknown profile 'fastest'"),
        (ParamOverrides(policy="warp"), None, "unknown policy"),  # type: ignore[arg-type]
        (ParamOverrides(ef=10, level_topn=TOPN), None, "params.ef means nothing to the policy 'level'"),
        (ParamOverrides(policy="best_first", level_topn=TOPN), None, "level_topn means nothing"),
        (ParamOverrides(ef=10), "exact", "means nothing to the policy 'exhaustive'"),
        (ParamOverrides(policy="level"), None, "needs params.level_topn"),
        (ParamOverrides(policy="level_pruned", ef=9), None, "params.ef means nothing"),
        (ParamOverrides(ef=0), None, "ef must be between 1 and 2000"),
        (ParamOverrides(ef=2001), None, "ef must be between 1 and 2000"),
        (ParamOverrides(beam_width=513), None, "beam_width must be between 1 and 512"),
        (ParamOverrides(max_steps=101), None, "max_steps must be between 1 and 100"),
        (ParamOverrides(level_topn=TOPN[:5]), None, "must hold 6 numbers, not 5"),
        (ParamOverrides(level_topn=()), None, "must hold 6 numbers, not 0"),
        (ParamOverrides(level_topn=(*TOPN[:5], 0)), None, "between 1 and 2000"),
        (ParamOverrides(level_topn=(*TOPN[:5], 2001)), None, "between 1 and 2000"),
    ],
)
def test_what_is_refused(overrides: ParamOverrides | None, profile: str | None, message: str) -> None:
    with pytest.raises(InvalidQuery, match=message):
        resolve(overrides, profile)


def test_how_many_items() -> None:
    level = PROFILES["nann"]
    assert result_size(None, BALANCED, max_k=1000) == 200
    assert result_size(None, BALANCED, max_k=50) == 50
    assert result_size(None, level, max_k=1000) == 150
    assert result_size(150, level, max_k=1000) == 150
    assert result_size(1, BALANCED, max_k=1000) == 1
    assert result_size(1000, BALANCED, max_k=1000) == 1000


@pytest.mark.parametrize(
    ("k", "policy"), [(0, "balanced"), (-1, "balanced"), (1001, "balanced"), (151, "nann")]
)
def test_how_many_is_too_many(k: int, policy: str) -> None:
    with pytest.raises(InvalidQuery, match=str(k)):
        result_size(k, PROFILES[policy], max_k=1000)


def test_a_last_level_wider_than_the_limit_is_refused_too() -> None:
    with pytest.raises(InvalidQuery, match="between 1 and 100, not 150"):
        result_size(None, PROFILES["nann"], max_k=100)
