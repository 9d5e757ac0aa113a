"""A server that leaves processors to its transports and to the generator of the load."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["LanesOption", "lanes_flags", "lanes_settings", "lanes_words"]

LanesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Lanes of one thread each, not one a processor: the service and the generator get the others.",
    ),
]


def lanes_settings(lanes: int | None) -> dict[str, Any]:
    """The settings of a server with `lanes` lanes of one thread each."""
    return {} if lanes is None else {"lanes": lanes, "intra_op_threads": 1}


def lanes_flags(lanes: int | None) -> list[str]:
    """The same as flags of ``nann serve``."""
    return [
        word
        for name, value in lanes_settings(lanes).items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def lanes_words(lanes: int | None) -> str:
    """What the row of the table says of them."""
    return "" if lanes is None else f"; {lanes} {'lane' if lanes == 1 else 'lanes'} of one thread"
