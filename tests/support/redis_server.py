"""A real Redis for tests: on a free port, keeping every write in its append-only file, killed at will."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

from outside_programs import outside_program

__all__ = ["RedisServer"]

_ATTEMPTS = 5


class RedisServer:
    """``redis-server`` as a child process; `stop` it, or `kill` and `start` it again on the same port."""

    def __init__(self, directory: Path, *more: str) -> None:
        program = outside_program("redis-server", install="apt install redis-server")
        self._command = [
            *(program, "--dir", str(directory), "--save", "", "--appendonly", "yes"),
            # Each write is handed to the system before it is acknowledged, whatever is synced when.
            *("--appendfsync", "everysec", "--bind", "127.0.0.1", *more),
        ]
        self._process: subprocess.Popen[str] | None = None
        self.port = 0
        for _ in range(_ATTEMPTS):
            self.port = _free_port()
            if self._started():
                return
        raise AssertionError("redis-server does not start")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start again after `kill`; returns once it takes commands."""
        assert self._started(), "redis-server does not start again"

    def kill(self) -> None:
        """End it as a crash would: no last words, nothing written that was not."""
        self._end(signal.SIGKILL)

    def suspend(self) -> None:
        """Let it hang: it takes connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """End `suspend`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it for good."""
        if self._process is not None:
            self._end(signal.SIGKILL)

    def _started(self) -> bool:
        self._process = subprocess.Popen(
            [*self._command, "--port", str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "Ready to accept connections" in line:
                return True
        self._end(signal.SIGKILL)
        return False

    def _end(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
