"""From what a caller said about the search (profile, overrides, k) to checked `SearchParams` and k."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from nann.engine.errors import InvalidQuery
from nann.engine.types import Policy, SearchParams
from nann.service.settings import Settings
from nann.service.types import ParamOverrides

__all__ = ["DEFAULT_K", "result_size", "search_params"]

DEFAULT_K: Final = 200  # the contract's
_LEVEL_TOPN_LENGTH: Final = 6  # t0 … t5, reference/nann.md "Served"
_FIELDS: Final[Mapping[Policy, tuple[str, ...]]] = {
    "best_first": ("ef", "beam_width", "max_steps", "gate_width", "gate_margin"),
    "level": ("level_topn",),
    "level_pruned": ("level_ef", "level_steps"),  # from a profile, or NANN's: requests have no field for them
    "inner_product": ("ef",),
    "exhaustive": (),
}


def search_params(
    overrides: ParamOverrides | None,
    profile: str | None,
    *,
    profiles: Mapping[str, SearchParams],
    default: SearchParams,
    settings: Settings,
) -> SearchParams:
    """The profile (or `default`) with the overrides laid over it.

    Raises:
        InvalidQuery: an unknown profile, a parameter the policy does not have, or one above its limit.
    """
    if profile is not None and profile not in profiles:
        raise InvalidQuery(f"unknown profile {profile!r}, known are {', '.join(sorted(profiles))}")
    base = default if profile is None else profiles[profile]
    if overrides is None:
        return base
    policy = overrides.policy or ("level" if overrides.level_topn is not None else base.policy)
    if policy not in _FIELDS:
        raise InvalidQuery(f"unknown policy {policy!r}, known are {', '.join(_FIELDS)}")
    given = {
        name: value
        for name in ("ef", "beam_width", "max_steps", "gate_width", "gate_margin", "level_topn")
        if (value := getattr(overrides, name)) is not None
    }
    for name in given:
        if name not in _FIELDS[policy]:
            raise InvalidQuery(f"params.{name} means nothing to the policy {policy!r}")
    _check_limits(given, settings)
    merged = {name: given.get(name, getattr(base, name)) for name in _FIELDS[policy]}
    if policy == "level" and not merged["level_topn"]:
        raise InvalidQuery("the policy 'level' needs params.level_topn")
    return SearchParams(policy=policy, **merged)


def _check_limits(given: Mapping[str, Any], settings: Settings) -> None:
    limits = {
        "ef": settings.max_ef,
        "beam_width": settings.max_beam_width,
        "max_steps": settings.max_steps_limit,
    }
    for name, limit in limits.items():
        if name in given and not 1 <= given[name] <= limit:
            raise InvalidQuery(f"params.{name} must be between 1 and {limit}, not {given[name]}")
    if not 0 <= given.get("gate_width", 0) <= settings.max_ef:
        raise InvalidQuery(
            f"params.gate_width must be between 0 and {settings.max_ef}, not {given['gate_width']}"
        )
    if not math.isfinite(given.get("gate_margin", 0.0)):
        raise InvalidQuery("params.gate_margin must be a finite number")
    level_topn = given.get("level_topn")
    if level_topn is None:
        return
    if len(level_topn) != _LEVEL_TOPN_LENGTH:
        raise InvalidQuery(f"level_topn must hold {_LEVEL_TOPN_LENGTH} numbers, not {len(level_topn)}")
    if not all(1 <= width <= settings.max_ef for width in level_topn):
        raise InvalidQuery(f"level_topn must hold numbers between 1 and {settings.max_ef}, not {level_topn}")


def result_size(k: int | None, params: SearchParams, *, max_k: int) -> int:
    """How many items to return: `k`, or t5 of `level_topn`, or `DEFAULT_K`.

    Raises:
        InvalidQuery: it is below 1, above `max_k`, or above t5.
    """
    last_width = params.level_topn[-1] if params.policy == "level" else None
    if k is None:
        k = min(DEFAULT_K, max_k) if last_width is None else last_width
    if not 1 <= k <= max_k:
        raise InvalidQuery(f"k must be between 1 and {max_k}, not {k}")
    if last_width is not None and k > last_width:
        raise InvalidQuery(f"k is {k}, more than the last number of level_topn, {last_width}")
    return k
