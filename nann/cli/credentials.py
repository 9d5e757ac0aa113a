"""What a command shows to the server that it asks, and whom it trusts to be that server."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import typer

from nann.cli.parameters import Flag

__all__ = ["API_KEY_VARIABLE", "CREDENTIAL_FLAGS", "NO_CREDENTIALS", "Credentials", "credentials_of"]

# Not NANN_…: those are the server's, which refuses to start with one that it does not know.
API_KEY_VARIABLE: Final = "NANNCLIENT_API_KEY"
# There is no flag for the key itself: whoever uses the machine can read the flags of a process.
CREDENTIAL_FLAGS: Final = (
    Flag("api_key_file", Path, f"File that holds the API key alone; by default ${API_KEY_VARIABLE}, if set."),
    Flag("ca_file", Path, "https, grpcs: certificates (PEM) to trust in place of the system's."),
    Flag(
        "client_cert_file", Path, "https, grpcs: our own certificate (PEM), for a server that asks for one."
    ),
    Flag("client_key_file", Path, "https, grpcs: its private key (PEM)."),
)
_KEY: Final = re.compile(r"[\x21-\x7e]{1,1024}")


@dataclass(frozen=True, slots=True)
class Credentials:
    """An API key and files of certificates, each where the server wants it."""

    api_key: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    client_cert: tuple[Path, Path] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What goes with every call, over gRPC as metadata."""
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}

    def tls(self) -> ssl.SSLContext:
        """For https."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.client_cert is not None:
            context.load_cert_chain(*self.client_cert)
        return context

    def channel(self, module: Any, url: str, options: Sequence[tuple[str, int]] = ()) -> Any:
        """A channel of `module` (grpc, or grpc.aio) to ``grpc://`` or ``grpcs://`` HOST:PORT."""
        import grpc

        parts = urlsplit(url)
        if parts.scheme == "grpc":
            return module.insecure_channel(parts.netloc, options=options)
        roots = None if self.ca_file is None else self.ca_file.read_bytes()
        cert, key = (path.read_bytes() for path in self.client_cert) if self.client_cert else (None, None)
        return module.secure_channel(
            parts.netloc, grpc.ssl_channel_credentials(roots, key, cert), options=options
        )


NO_CREDENTIALS: Final = Credentials()


def credentials_of(flags: Mapping[str, Any], url: str | None) -> Credentials:
    """Those of the values of `CREDENTIAL_FLAGS`, for a server at `url`; raises BadParameter."""
    cert, key = flags["client_cert_file"], flags["client_key_file"]
    if (cert is None) != (key is None):
        raise typer.BadParameter("give --client-cert-file and --client-key-file together")
    for name in ("api_key_file", "ca_file", "client_cert_file", "client_key_file"):
        if flags[name] is not None and not flags[name].is_file():
            raise typer.BadParameter(f"--{name.replace('_', '-')} {flags[name]}: there is no such file")
    certificates = [name for name in ("ca_file", "client_cert_file") if flags[name] is not None]
    if certificates and not (url or "").startswith(("https://", "grpcs://")):
        raise typer.BadParameter(f"--{certificates[0].replace('_', '-')} is for https:// and grpcs://")
    api_key = _api_key(flags["api_key_file"])
    return Credentials(api_key, flags["ca_file"], None if cert is None else (cert, key))


def _api_key(path: Path | None) -> str | None:
    origin = f"--api-key-file {path}"
    if path is not None:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    else:
        origin, text = API_KEY_VARIABLE, os.environ.get(API_KEY_VARIABLE, "")
        if not text:
            return None
    if not _KEY.fullmatch(text):
        raise typer.BadParameter(f"{origin} must hold one key, of printable characters, and nothing else")
    return text
