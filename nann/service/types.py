"""What goes into and comes out of the use cases: plain values, with no trace of a wire form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

    from nann.engine.types import Hits, ItemId, Note, Policy, UserId

__all__ = [
    "ModelConfig",
    "ModelMetadata",
    "ParamOverrides",
    "RetrieveReply",
    "RetrieveRequest",
    "UserProfile",
    "VersionPolicy",
    "VersionState",
    "VersionStatus",
    "parse_policy",
]

_POLICY: Final = re.compile(r"all|latest(?::([1-9][0-9]{0,8}))?|specific:([1-9][0-9]*(?:,[1-9][0-9]*)*)")

VersionState: TypeAlias = Literal["START", "LOADING", "AVAILABLE", "UNLOADING", "END"]


@dataclass(frozen=True, slots=True)
class ParamOverrides:
    """The search parameters a caller named; None leaves the profile's (or the default) value.

    `level_topn` alone means the policy ``level``.
    """

    policy: Policy | None = None
    ef: int | None = None
    beam_width: int | None = None
    max_steps: int | None = None
    gate_width: int | None = None
    gate_margin: float | None = None
    level_topn: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class RetrieveRequest:
    """One retrieval as the caller asked for it, unchecked except for the types written here.

    Exactly one of `user_id`, `history` (item ids, oldest first) and `comm_seq` (flat, float) is
    given. None everywhere means "the caller said nothing". `params` override `profile`.
    `explain` asks the transport to show how the answer was found.
    """

    user_id: UserId | None = None
    history: Sequence[ItemId] | None = None
    comm_seq: Float[np.ndarray, " width"] | None = None
    k: int | None = None
    model: str | None = None
    version: int | None = None
    label: str | None = None
    params: ParamOverrides | None = None
    profile: str | None = None
    include_ids: Sequence[ItemId] | None = None
    exclude_ids: Sequence[ItemId] = ()
    filter: Mapping[str, Any] | None = None
    exclude_seen: bool | None = None
    timeout_ms: float | None = None
    strict: bool = False
    explain: bool = False
    with_attributes: bool = True


@dataclass(frozen=True, slots=True)
class RetrieveReply:
    """The engine's answer, who gave it, and where its time went.

    `timings_ms`: ``queue`` (waiting for a lane), ``search`` (on the lane, with its batch-mates) and
    ``total`` (inside the service). `notes` holds the engine's notes and the service's own; `explain` is what
    the service has to say beside ``hits.explain``.
    """

    hits: Hits
    model: str
    version: int
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    explain: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UserProfile:
    """What is known of one user: the base history of the artifact, then the live events, newest last."""

    user_id: UserId
    history: tuple[ItemId, ...]
    n_base: int
    n_live: int


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Which of the versions that are there should be served: the newest `latest`, `specific` ones, or all.

    Neither `latest` nor `specific` means all (TensorFlow Serving's ``ServableVersionPolicy``).
    """

    latest: int | None = 1
    specific: tuple[int, ...] = ()


def parse_policy(text: str) -> VersionPolicy:
    """``latest``, ``latest:N``, ``all`` or ``specific:N,N…``; raises ValueError for anything else."""
    match = _POLICY.fullmatch(text)
    if match is None:
        raise ValueError(f"a version policy is latest, latest:N, all or specific:N,N…, not {text!r}")
    if text == "all":
        return VersionPolicy(latest=None)
    if match[2] is not None:
        return VersionPolicy(latest=None, specific=tuple(sorted({int(n) for n in match[2].split(",")})))
    return VersionPolicy(latest=int(match[1] or 1))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model to serve: where its version directories lie, which of them, and names for some."""

    name: str
    base_path: Path
    policy: VersionPolicy = field(default_factory=VersionPolicy)
    labels: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """One version's place in its life, in TF Serving's words (``ModelVersionStatus``)."""

    version: int
    state: VersionState
    error_code: str = "OK"
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a client must know of a served version to call it.

    ``comm_seq`` holds `history_length` * `input_dim` numbers; ids are ``"int"`` or ``"str"``.
    """

    model: str
    version: int
    num_items: int
    history_length: int
    input_dim: int
    item_id_type: str
    user_id_type: str
    profiles: tuple[str, ...]
