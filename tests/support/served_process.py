"""A server process with a fake engine, to be killed: everything but the model is the real thing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["ServedProcess", "served_process"]

_PROGRAM = """
import asyncio, json, sys
from fake_engine import FakeEngine
from nann.service.app import Application
from nann.service.logs import configure_logging
from nann.service.settings import Settings

settings = Settings(**json.loads(sys.argv[1]))
configure_logging(level="info", log_format="json")
sys.exit(asyncio.run(Application(settings, load_engine=lambda _path: FakeEngine()).run()).code)
"""
_SUPPORT = Path(__file__).parent


class ServedProcess:
    """Where it listens. It is ready."""

    def __init__(self, process: subprocess.Popen[bytes], ports: dict[str, int]) -> None:
        self._process = process
        self.rest_url = f"http://127.0.0.1:{ports['rest_port']}"
        self.grpc_url = f"grpc://127.0.0.1:{ports['grpc_port']}"

    def kill(self) -> None:
        """kill -9, and wait until it is dead."""
        self._process.kill()
        assert self._process.wait() == -signal.SIGKILL


@contextmanager
def served_process(repository: Path, **settings: Any) -> Iterator[ServedProcess]:
    """Serve a fake model from `repository` in a process of its own; it is killed at the end."""
    (repository / "nann" / "1").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        ready_file = Path(directory) / "ready.json"
        fields = {"rest_port": 0, "grpc_port": 0, "ready_file": str(ready_file), **settings}
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps({"repository": str(repository), **fields})],
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(_SUPPORT)},
        )
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line.decode())
                if '"ready: ' in lines[-1]:
                    break
            else:
                raise AssertionError("".join(lines))
            yield ServedProcess(process, json.loads(ready_file.read_text(encoding="utf-8")))
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
