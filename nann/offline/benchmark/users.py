"""Whose requests a benchmark sends: users of an artifact with their histories, or lines of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from nann.engine.artifacts import Artifact
from nann.engine.types import ItemId, UserId

__all__ = ["User", "read_users", "sample_users"]


@dataclass(frozen=True, slots=True)
class User:
    """One user to ask for: by `user_id`, by `history` (item ids, oldest first), or either."""

    user_id: UserId | None = None
    history: Sequence[ItemId] | None = None


def sample_users(version_dir: Path, *, limit: int | None, seed: int) -> list[User]:
    """A seeded sample of the artifact's users that have a history, in random order; all for no limit.

    Raises:
        ArtifactError: the version is damaged.
        ValueError: it knows no user with a history.
    """
    artifact = Artifact.open(version_dir, verify="fast")
    splits = artifact.history_row_splits
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(np.diff(splits)))[:limit]
    if not rows.size:
        raise ValueError(f"{version_dir} knows no user with a history")
    return [
        User(
            _plain(artifact.history_ids[row]),
            [
                _plain(artifact.item_ids[item])
                for item in artifact.history_items[splits[row] : splits[row + 1]]
            ],
        )
        for row in rows.tolist()
    ]


def read_users(path: Path) -> list[User]:
    """Users of a JSON Lines file: ``{"user_id": …}`` or ``{"history": [item ids]}`` a line, or both.

    Raises:
        ValueError: names the line that is wrong, or says that there is none.
    """
    users = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(fields, dict) or not fields or not fields.keys() <= {"user_id", "history"}:
            raise ValueError(f'{path}, line {number}: expected {{"user_id": …}} or {{"history": […]}}')
        users.append(User(fields.get("user_id"), fields.get("history")))
    if not users:
        raise ValueError(f"{path} holds no user")
    return users


def _plain(name: Any) -> ItemId:
    """A NumPy integer or a string as a plain id."""
    return name if isinstance(name, str) else int(name)
