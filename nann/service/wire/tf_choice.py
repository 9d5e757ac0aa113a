"""Which model, version or label a call of TensorFlow Serving's names, and its words for what is not there.

Texts are TensorFlow Serving's (reference/tensorflow-serving.md, "Error statuses").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nann.engine.errors import InvalidQuery, UnknownModel, UnknownVersion

__all__ = ["ModelChoice", "model_choice", "not_found_as", "servable_not_found", "versions_not_found"]


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model, version or label a ModelSpec or a path names."""

    name: str
    version: int | None = None
    label: str | None = None


def model_choice(spec: Any) -> ModelChoice:
    """What a ModelSpec names; raises InvalidQuery when it names no model."""
    if not spec.name:
        raise InvalidQuery("ModelSpec has no name specified.")
    kind = spec.WhichOneof("version_choice")
    return ModelChoice(
        name=spec.name,
        version=spec.version.value if kind == "version" else None,
        label=spec.version_label if kind == "version_label" else None,
    )


def servable_not_found(choice: ModelChoice) -> str:
    """The words for a model or version that Predict cannot find."""
    which = (
        f"Latest({choice.name})" if choice.version is None else f"Specific({choice.name}, {choice.version})"
    )
    return f"Servable not found for request: {which}"


def versions_not_found(choice: ModelChoice) -> str:
    """The words for a model or version that GetModelStatus cannot find."""
    if choice.version is None:
        return f"Could not find any versions of model {choice.name}"
    return f"Could not find version {choice.version} of model {choice.name}"


@contextmanager
def not_found_as(message: str) -> Iterator[None]:
    """Say `message` where the block finds no such model or version."""
    try:
        yield
    except (UnknownModel, UnknownVersion) as error:
        raise type(error)(message) from error
