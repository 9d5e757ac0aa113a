"""A contender in a process of its own: other libraries, other threads, measured by itself."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nann

__all__ = ["Worker", "WorkerError"]

_PROJECT = Path(nann.__file__).parents[1]


class WorkerError(Exception):
    """A worker could not start, refused a request or died; the message has its last words."""


class Worker:
    """Starts ``python -m module arguments…`` at the first request; one request at a time.

    What the process prints goes to `log`.
    """

    def __init__(
        self,
        python: str,
        module: str,
        arguments: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [python, "-m", module, *arguments]
        self._log = log
        # The project's modules by path: the other environment does not have it installed.
        self._environment = {**os.environ, "PYTHONPATH": str(_PROJECT), **(environment or {})}
        self._process: subprocess.Popen[str] | None = None

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its reply. Raises `WorkerError`."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self._command[2]} ended: {self._last_words()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self._command[2]}: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the process, if it was started."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("w", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=self._environment,
                )
        return self._process

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
