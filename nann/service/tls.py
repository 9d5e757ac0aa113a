"""The certificates of both transports: read at start, and again when their files change.

A new certificate (cert-manager, certbot) is used from the next connection on, without a restart; one that
cannot be used is logged once, and the old one stays. The client authority is read at start only: it decides
who may connect, and OpenSSL cannot exchange it under a running listener.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from nann.service.metrics import Metrics
from nann.service.settings import Settings, SettingsError
from nann.service.watched_files import WatchedFiles

__all__ = ["Pem", "Tls", "open_tls"]


@dataclass(frozen=True, slots=True)
class Pem:
    """A certificate chain and its private key, as gRPC wants them."""

    cert: bytes
    key: bytes


class Tls:
    """One certificate and key, and the contexts made of them. Used from any thread (gRPC has its own)."""

    def __init__(
        self, cert_file: Path, key_file: Path, client_ca_file: Path | None, metrics: Metrics
    ) -> None:
        """Raises SettingsError when a file cannot be used."""
        self._cert_file, self._key_file, self._client_ca_file = cert_file, key_file, client_ca_file
        self._files = WatchedFiles(
            "certificate", [cert_file, key_file], lambda: (self._new_context(), self._read()), metrics
        )
        self.client_ca = None if client_ca_file is None else client_ca_file.read_bytes()
        self._listening = self._new_context()
        self._listening.sni_callback = self._choose

    @property
    def server_context(self) -> ssl.SSLContext:
        """What a listener wraps its connections with; each handshake gets the newest certificate."""
        return self._listening

    @property
    def pem(self) -> Pem:
        """What was read last."""
        return self._files.value[1]

    def refresh(self) -> Pem:
        """Read the files again if they have changed."""
        return self._files.refresh()[1]

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._files.refresh()[0]

    def _read(self) -> Pem:
        try:
            return Pem(self._cert_file.read_bytes(), self._key_file.read_bytes())
        except OSError as error:
            raise SettingsError(f"{error.filename}: {error.strerror}") from None

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            # An encrypted key would have OpenSSL ask a terminal for its password.
            context.load_cert_chain(self._cert_file, self._key_file, password=_no_password)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"--tls-cert-file {self._cert_file}, --tls-key-file {self._key_file}: {_reason(error)}"
            ) from None
        if self._client_ca_file is not None:
            try:
                context.load_verify_locations(cafile=self._client_ca_file)
            except OSError as error:
                raise SettingsError(
                    f"--tls-client-ca-file {self._client_ca_file}: {_reason(error)}"
                ) from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def open_tls(settings: Settings, metrics: Metrics) -> Tls | None:
    """The certificates that the settings name, None where they name none; raises SettingsError."""
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    return Tls(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file, metrics)


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one that is not, readable by this server's user only")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"not a certificate and its key in PEM ({error.reason or error})"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
