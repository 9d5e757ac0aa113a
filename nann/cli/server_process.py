"""A server as a child process: started on free ports, ready when it says so, stopped at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RunningServer", "ServerError", "running_server"]

_READY_TIMEOUT_S = 300.0  # a first start compiles every shape; seconds on two cores, but not on any machine
_STOP_TIMEOUT_S = 40.0  # twice the default time a drain may take
_POLL_INTERVAL_S = 0.1


class ServerError(Exception):
    """The server did not come up; the message holds its own last line."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Where it listens, its process, and how long it took to be ready."""

    rest_url: str
    grpc_url: str
    start_s: float
    pid: int


@contextmanager
def running_server(
    repository: Path,
    *,
    log_path: Path,
    flags: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Iterator[RunningServer]:
    """Serve `repository` while the block runs, with more `flags` of ``nann serve``; log to `log_path`.

    `environ` are variables besides those of this process.

    Live events are kept in memory, so that it leaves nothing in the repository.

    Raises:
        ServerError: it ended, or was not ready in time.
    """
    ready_file = log_path.with_name("server.ready")
    ready_file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "nann",
        "serve",
        "--repository",
        str(repository),
        "--user-store",
        "memory",
        *flags,
    ]
    command += ["--rest-port", "0", "--grpc-port", "0", "--ready-file", str(ready_file)]
    started_s = time.monotonic()
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environ or {})},
        ) as process,
    ):
        try:
            ports = _wait_until_ready(process, ready_file, log_path)
            yield RunningServer(
                rest_url=f"http://127.0.0.1:{ports['rest_port']}",
                grpc_url=f"grpc://127.0.0.1:{ports['grpc_port']}",
                start_s=time.monotonic() - started_s,
                pid=process.pid,
            )
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], ready_file: Path, log_path: Path) -> dict[str, int]:
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while not ready_file.is_file():
        if (code := process.poll()) is not None:
            raise ServerError(f"the server ended with code {code}: {_last_line(log_path)}")
        if time.monotonic() > deadline_s:
            raise ServerError(f"the server was not ready after {_READY_TIMEOUT_S:.0f} s; see {log_path}")
        time.sleep(_POLL_INTERVAL_S)
    ports: dict[str, int] = json.loads(ready_file.read_text(encoding="utf-8"))
    return ports


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _last_line(log_path: Path) -> str:
    lines = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1]} (see {log_path})" if lines else f"see {log_path}"
