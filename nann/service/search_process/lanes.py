"""The lanes of an engine in another process, which this module starts, asks, and starts again if it ends."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from nann.engine.errors import BackendError
from nann.engine.lanes import LaneProcess
from nann.engine.retrievers.retriever import silent
from nann.service.logs import get_logger
from nann.service.search_process.messages import (
    Opened,
    OpenLanes,
    dump,
    load,
    pack_batch,
    raise_failure,
    unpack_answers,
)

if TYPE_CHECKING:
    from nann.engine.retrievers.retriever import Answer, PreparedQuery

__all__ = ["PROCESS_BYTES", "ProcessLanes", "Starter"]

# Anonymous memory of a process that has imported all it needs, by scorer, and opened no more than a toy.
PROCESS_BYTES: Final = {"pjrt": 128 << 20, "tensorflow": 320 << 20}

_PROGRAM: Final = "from nann.service.search_process.worker import main; main()"
# A terminal's Ctrl-C is for the server, which drains first. Not a session of its own: where Linux shares
# processors out by session (sched_autogroup), priorities say nothing across two of them.
_OWN_GROUP: Final[dict[str, Any]] = {"process_group": 0} if sys.version_info >= (3, 11) else {}
_ENVIRONMENT: Final = {
    # Not the modules of the directory that the server happens to be started in.
    "PYTHONSAFEPATH": "1",
    # NumPy's threads for matrices, of which no search has any: they spin as they start.
    "OPENBLAS_NUM_THREADS": "1",
}
_STDERR: Final = 2
# A lane searches one batch and has the next one at hand: between two of them nothing has to come from the
# server, whose interpreter may be busy with its event loop for milliseconds.
_LANE_DEPTH: Final = 2
_CLOSE_TIMEOUT_S: Final = 5.0

log = get_logger(__name__)


class Starter:
    """Starts processes from a thread of its own, whose priority they get.

    Versions are loaded on a thread of low priority, and a process that is started there could not search at
    the usual one afterwards.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[list[str], list[int], SimpleQueue[Any]]] = SimpleQueue()
        threading.Thread(target=self._work, name="nann-starter", daemon=True).start()

    def start(self, command: list[str], files: Sequence[int]) -> subprocess.Popen[bytes]:
        """Run `command` with the open `files`. Raises OSError when it cannot be started."""
        reply: SimpleQueue[subprocess.Popen[bytes] | OSError] = SimpleQueue()
        self._jobs.put((command, list(files), reply))
        started = reply.get()
        if isinstance(started, OSError):
            raise started
        return started

    def _work(self) -> None:
        while True:
            command, files, reply = self._jobs.get()
            try:
                started = subprocess.Popen(
                    command,
                    pass_fds=files,
                    stdin=subprocess.DEVNULL,
                    stdout=_STDERR,
                    env={**os.environ, **_ENVIRONMENT},
                    **_OWN_GROUP,
                )
            except OSError as error:
                reply.put(error)
            else:
                reply.put(started)


@dataclass(slots=True)
class _Process:
    """A search process that runs, or ran: one connection to open and close it, `_LANE_DEPTH` a lane."""

    popen: subprocess.Popen[bytes]
    control: Connection
    lanes: list[Connection]
    idle: list[SimpleQueue[Connection]]
    """Of each lane, the connections on which nothing is asked."""
    compiled_before: int
    """Programs that the processes before it compiled."""
    n_compilations: int = 0

    def tell(self, connection: Connection, what: Any) -> Any:
        """What the process answers.

        Raises:
            RetrievalError, ValueError: what it raised.
            BackendError: it has ended, or was, because it took longer than `connection` waits.
        """
        try:
            connection.send_bytes(dump(what))
            succeeded, answer = load(connection.recv_bytes())
        except BlockingIOError as error:
            self.popen.kill()
            self.popen.wait()
            raise BackendError("the search process did not answer in time, and was ended") from error
        except (EOFError, OSError) as error:
            self.popen.wait()  # its connections close as it ends
            raise BackendError(f"the search process ended with {_words(self.popen.returncode)}") from error
        if not succeeded:
            raise_failure(*answer)
        return answer

    def warm_up(self) -> bool:
        bit_equal, self.n_compilations = self.tell(self.control, None)
        return bool(bit_equal)

    def hang_up(self) -> None:
        """Close the connections, upon which it ends."""
        for connection in (self.control, *self.lanes):
            with suppress(OSError):
                connection.close()

    def end(self) -> None:
        self.hang_up()
        try:
            self.popen.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


class ProcessLanes:
    """`Lanes` (engine/lanes.py) in a process of their own.

    The process ends when this one does, however that happens, because its connections close. If it ends
    by itself, the searches that were under way fail, and the next search starts another: lanes that failed
    are in doubt, so that this is a probe and not somebody's query.
    """

    def __init__(self, ask: OpenLanes, starter: Starter, *, search_timeout_s: float | None = None) -> None:
        """Start the process and open the version in it.

        One that keeps a batch for more than `search_timeout_s` (None: as long as it likes) is ended, with
        all that it searches: a lane that hangs would else be lost for good, and nobody would hear of it.

        Raises:
            ArtifactError, BackendError, Unsupported: as `devices.open_lanes`.
        """
        self._ask = ask
        self._starter = starter
        self._search_timeout_s = search_timeout_s
        self._changing = threading.Lock()
        self._closed = False
        self._n_starts = 0
        self._process, opened = self._start()
        self.takes_comm_seq = opened.takes_comm_seq
        # Another one is needed at once, whoever waits for it, and the files have been verified.
        self._ask = replace(ask, gives_way=False, verify="fast")

    @property
    def count(self) -> int:
        return self._ask.lanes

    @property
    def depth(self) -> int:
        return _LANE_DEPTH

    @property
    def n_compilations(self) -> int:
        process = self._process
        return process.compiled_before + process.n_compilations

    @property
    def process(self) -> LaneProcess:
        return LaneProcess(self._process.popen.pid, self._n_starts)

    def warm_up(self) -> bool:
        return self._process.warm_up()

    def search(
        self, batch: Sequence[PreparedQuery], lane: int, probe: Callable[[str], None]
    ) -> tuple[list[Answer], int]:
        if probe is not silent:
            raise ValueError("the phases of a search are seen by the process that searches")
        process = self._running()
        connection = process.idle[lane].get()
        try:
            packed, launches, process.n_compilations = process.tell(connection, pack_batch(batch))
        finally:
            process.idle[lane].put(connection)
        return unpack_answers(packed), launches

    def close(self) -> None:
        with self._changing:
            self._closed = True
            process = self._process
        process.end()

    def _running(self) -> _Process:
        """The process, started anew where it has ended."""
        if self._process.popen.returncode is None:
            return self._process
        with self._changing:
            if self._closed:
                raise BackendError("the search process has been closed")
            if self._process.popen.returncode is not None:
                log.warning("starting the search process again")
                self._process.hang_up()
                process, _ = self._start(compiled_before=self.n_compilations)
                try:
                    process.warm_up()
                except BaseException:
                    process.end()
                    raise
                self._process = process  # not before: the other lanes look at it without the lock
            return self._process

    def _start(self, *, compiled_before: int = 0) -> tuple[_Process, Opened]:
        n_lanes = self._ask.lanes
        pairs = [Pipe() for _ in range(1 + n_lanes * _LANE_DEPTH)]
        theirs = [there for _, there in pairs]
        numbers = [connection.fileno() for connection in theirs]
        try:
            how = "gently" if self._ask.gives_way else "at once"
            command = [sys.executable, "-c", _PROGRAM, how, self._ask.scorer, *map(str, numbers)]
            popen = self._starter.start(command, numbers)
        except OSError as error:
            raise BackendError(f"the search process cannot be started: {error}") from error
        finally:
            for connection in theirs:
                connection.close()
        control, *lanes = (here for here, _ in pairs)
        idle: list[SimpleQueue[Connection]] = [SimpleQueue() for _ in range(n_lanes)]
        for number, connection in enumerate(lanes):
            if self._search_timeout_s is not None:
                _set_timeout(connection, self._search_timeout_s)
            idle[number % n_lanes].put(connection)
        process = _Process(popen, control, lanes, idle, compiled_before)
        try:
            opened = process.tell(control, self._ask)
        except BaseException:
            process.end()
            raise
        self._n_starts += 1
        return process, opened


def _set_timeout(connection: Connection, timeout_s: float) -> None:
    """Have what waits longer for the other end raise BlockingIOError, at no cost to what does not."""
    whole_s, rest_s = divmod(timeout_s, 1)
    timeval = struct.pack("@ll", int(whole_s), int(rest_s * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as ours:
        for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, direction, timeval)


def _words(returncode: int) -> str:
    return f"signal {-returncode}" if returncode < 0 else f"code {returncode}"
