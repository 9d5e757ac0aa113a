"""``nann serve``: one flag for every setting, made from the settings so that they cannot drift apart."""

from __future__ import annotations

from typing import Any

import typer

from nann.cli.parameters import settings_flags, with_flags

__all__ = ["serve_command"]


@with_flags(settings_flags())
def serve_command(**settings: Any) -> None:
    """Serve a model repository over REST and gRPC until SIGTERM.

    Every flag has an environment variable; a flag wins over it.
    """
    from nann.service.settings import SettingsError, load_settings

    try:
        loaded = load_settings(**settings)
    except SettingsError as error:
        raise typer.BadParameter(str(error)) from None
    from nann.service.app import serve

    raise typer.Exit(serve(loaded))
