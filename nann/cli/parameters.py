"""Flags as data, so that several commands can share them and some can be made from a settings object."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

import typer

__all__ = ["Flag", "given", "settings_flags", "with_flags"]


@dataclass(frozen=True, slots=True)
class Flag:
    """An optional flag ``--name-with-dashes``; a flag that is not given arrives as None."""

    name: str
    type: Any
    help: str


def with_flags(flags: Sequence[Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes ``**values`` the `flags` in place of that parameter."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        added = [
            inspect.Parameter(
                flag.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[flag.type | None, typer.Option(help=flag.help, show_default=False)],
            )
            for flag in flags
        ]
        command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*own, *added]} | {"return": None}
        return command

    return decorate


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Only the flags that were given, so that the callee's own defaults hold for the others."""
    return {name: value for name, value in values.items() if value is not None}


def settings_flags() -> list[Flag]:
    """One flag for every field of the server's settings, in their order and with their words."""
    from nann.service.settings import ENV_PREFIX, Settings

    flags = []
    for name, field in Settings.model_fields.items():
        notes = [f"env {ENV_PREFIX}{name.upper()}"]
        if field.is_required():
            notes.append("required")
        elif field.default_factory is None and field.default is not None:
            notes.append(f"default {field.default}")
        flags.append(Flag(name, _without_none(field.annotation), f"{field.description} ({'; '.join(notes)})"))
    return flags


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    (kept,) = (part for part in get_args(annotation) if part is not type(None))
    return kept
