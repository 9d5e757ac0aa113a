"""The server in a pod: Kubernetes' service links do it no harm, and a misspelt setting is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nann.cli.server_process import running_server

__all__ = ["MISSPELT", "SERVICE_LINKS", "EnvironmentResult", "measure_environment"]

# What a pod gets for the Services of deploy/kubernetes, nann and nann-headless (the latter has no address, so
# a Service nann-grpc stands in for it: its link has the name of a setting of ours).
SERVICE_LINKS: Final = {
    "NANN_SERVICE_HOST": "10.0.0.1",
    "NANN_SERVICE_PORT": "8501",
    "NANN_SERVICE_PORT_HTTP": "8501",
    "NANN_SERVICE_PORT_GRPC": "8500",
    "NANN_PORT": "tcp://10.0.0.1:8501",
    "NANN_PORT_8501_TCP": "tcp://10.0.0.1:8501",
    "NANN_PORT_8501_TCP_PROTO": "tcp",
    "NANN_PORT_8501_TCP_PORT": "8501",
    "NANN_PORT_8501_TCP_ADDR": "10.0.0.1",
    "NANN_GRPC_SERVICE_HOST": "10.0.0.2",
    "NANN_GRPC_PORT": "tcp://10.0.0.2:8500",
}
MISSPELT: Final = "NANN_QUEUE_LIMITS"
_WRONG_USAGE: Final = 2
_PATIENCE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class EnvironmentResult:
    """What a server did with the links, and what another one did with a misspelt setting."""

    ready_status: int
    exit_code: int
    named: bool
    refused_s: float

    @property
    def kept(self) -> bool:
        return self.ready_status == 200 and self.exit_code == _WRONG_USAGE and self.named

    def words(self) -> str:
        """One cell of the table."""
        links = f"{len(SERVICE_LINKS)} links set: `/readyz` {self.ready_status}"
        named = "names it" if self.named else "does not name it"
        return f"{links}; `{MISSPELT}`: exit {self.exit_code} after {self.refused_s:.1f} s, {named}"


def measure_environment(repository: Path, model: str | None) -> EnvironmentResult:
    """Start one server with the links and one with the misspelt setting as well.

    Raises:
        ServerError: the first one ended, or was not ready in time.
    """
    flags = ["--model", model] if model is not None else []
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "server.log"
        with (
            running_server(repository, log_path=log, flags=flags, environ=SERVICE_LINKS) as server,
            urllib.request.urlopen(f"{server.rest_url}/readyz") as reply,
        ):
            ready_status: int = reply.status
    started_s = time.monotonic()
    refused = subprocess.run(
        [sys.executable, "-m", "nann", "serve", "--repository", str(repository), "--rest-port", "0", *flags],
        env={**os.environ, **SERVICE_LINKS, MISSPELT: "1"},
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    return EnvironmentResult(
        ready_status,
        refused.returncode,
        MISSPELT in refused.stderr,
        time.monotonic() - started_s,
    )
