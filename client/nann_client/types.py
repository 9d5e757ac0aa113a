"""What goes into calls and what comes out of them: plain, frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nann_client.errors import InvalidQuery

__all__ = ["Id", "Item", "Note", "Query", "Reply", "SearchParams", "User", "VersionStatus"]

Id = int | str


@dataclass(frozen=True, slots=True)
class SearchParams:
    """How hard to search; None leaves the profile's value. `level_topn` alone means the policy ``level``."""

    policy: Literal["best_first", "level", "level_pruned", "exhaustive", "inner_product"] | None = None
    ef: int | None = None
    beam_width: int | None = None
    max_steps: int | None = None
    gate_width: int | None = None
    gate_margin: float | None = None
    level_topn: Sequence[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One retrieval. Exactly one of `user_id`, `history` and `comm_seq` says who it is for.

    None everywhere means the server's default. `history` is oldest first, and so is `comm_seq`: NANN's
    embedded history, rows of numbers.

    Raises:
        InvalidQuery: none of the three is given, or more than one.
    """

    user_id: Id | None = None
    history: Sequence[Id] | None = None
    comm_seq: Sequence[Sequence[float]] | None = None
    k: int | None = None
    model: str | None = None
    version: int | None = None
    params: SearchParams | None = None
    profile: str | None = None
    include_ids: Sequence[Id] = ()
    exclude_ids: Sequence[Id] = ()
    filter: Mapping[str, Any] | None = None
    exclude_seen: bool | None = None
    strict: bool = False
    explain: bool = False
    with_attributes: bool = True

    def __post_init__(self) -> None:
        # Here and not at the server, because a protobuf `oneof` would keep one of two without a word.
        who = [name for name in ("user_id", "history", "comm_seq") if getattr(self, name) is not None]
        if len(who) != 1:
            raise InvalidQuery(
                f"give exactly one of user_id, history and comm_seq, not {' and '.join(who) or 'none'}",
                code="invalid_query",
            )


@dataclass(frozen=True, slots=True)
class Item:
    """One retrieved item; a higher `score` is better. `attributes` is what the model knows of it."""

    item_id: Id
    score: float
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Note:
    """Something the caller should know about an answer, such as ids that were skipped; `code` is stable."""

    code: str
    message: str
    count: int


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one query, best item first.

    `n_scored` counts the items that the model scored; `timings_ms` says where the server's time went;
    `explain` is empty unless asked for.
    """

    items: tuple[Item, ...]
    model: str
    version: int
    n_scored: int
    timings_ms: Mapping[str, float]
    notes: tuple[Note, ...]
    explain: Mapping[str, Any]
    request_id: str | None


@dataclass(frozen=True, slots=True)
class User:
    """The history a retrieval would start from: `n_base` items of the model's, then `n_live` live ones."""

    user_id: Id
    history: tuple[Id, ...]
    n_base: int
    n_live: int


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """One version of a model; `state` is a word of TensorFlow Serving's, such as ``AVAILABLE``."""

    version: int
    state: str
    error_code: str
    error_message: str
