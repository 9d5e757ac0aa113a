"""Certificates of an authority of our own, made with the openssl command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Authority", "Certificate"]


@dataclass(frozen=True)
class Certificate:
    cert: Path
    key: Path


class Authority:
    """Issues certificates for loopback addresses; `ca` is its own."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._name = name
        made = self._make(name, "-x509", "-addext", "basicConstraints=critical,CA:TRUE")
        self.ca, self._key = made.cert, made.key

    def issue(self, name: str) -> Certificate:
        """A certificate and key in files of this name; issued again, they are new ones in the same files."""
        names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
        return self._make(
            name, "-x509", "-CA", str(self.ca), "-CAkey", str(self._key), "-addext", names, "-addext",
            "basicConstraints=critical,CA:FALSE",
        )  # fmt: skip

    def _make(self, name: str, *more: str) -> Certificate:
        made = Certificate(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        fresh = Certificate(made.cert.with_suffix(".new-pem"), made.key.with_suffix(".new-key"))
        command = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
        command += ["-subj", f"/CN={name}", "-days", "2", "-keyout", str(fresh.key), "-out", str(fresh.cert)]
        subprocess.run([*command, *more], check=True, capture_output=True)
        fresh.key.replace(made.key)
        fresh.cert.replace(made.cert)
        return made
