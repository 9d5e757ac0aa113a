"""The search process: opens one version's lanes and answers for them until its connections close."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from nann.service.allocator import keep_large_blocks_apart

# All else is imported by `_import`, on a thread that gives way: it takes a second of a processor's time.
if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from nann.engine.artifacts import Artifact
    from nann.engine.lanes import LocalLanes
    from nann.service.search_process.messages import Opened, OpenLanes

__all__ = ["main"]

T = TypeVar("T")

_NICENESS = 10
# The server's event loop goes first where both want a processor: it needs little, and everybody waits for it.
_SEARCH_NICENESS = 5
_TASKS: Final = Path("/proc/self/task")
_XLA_OPERATIONS: Final = "tf_XLAEigen"
_COMMON: Final = (
    "nann.engine.cpu.backend",
    "nann.engine.devices",
    "nann.engine.lanes",
    "nann.service.search_process.messages",
)
_OF_SCORER: Final = {
    "pjrt": ("jax", "nann.engine.scoring.pjrt_programs"),
    "tensorflow": ("nann.engine.scoring.tensorflow_scorer",),
}
# As in the server: a lane that comes back from native code waits for the other one so long at most.
_SWITCH_INTERVAL_S = 0.0005


def main() -> None:
    """Serve connections: one that controls, then those of the lanes in turn, as often for each lane as it may
    be asked at a time.

    The arguments: how to open ("gently" or "at once"), which scorer to expect, and the connections' file
    numbers.
    """
    # The server is told to go, and closes the connections when nothing is searched any more.
    for told_to_go in (signal.SIGINT, signal.SIGTERM):
        signal.signal(told_to_go, signal.SIG_IGN)
    keep_large_blocks_apart()
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, 0, _SEARCH_NICENESS)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    how, scorer, *numbers = sys.argv[1:]
    worker = _Worker(gives_way=how == "gently")
    worker.gently(partial(_import, scorer))
    from multiprocessing.connection import Connection

    control, *lanes = (Connection(int(number)) for number in numbers)
    for number, connection in enumerate(lanes):
        search = partial(worker.search, number)
        threading.Thread(
            target=_serve, args=(connection, search), name=f"nann-lane-{number}", daemon=True
        ).start()
    _serve(control, worker.do)
    # Nobody waits for the memory either, which takes the system a while to take back.
    for thread in _threads():
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, _NICENESS)
    # A lane may be in native code: nobody waits for what it finds.
    os._exit(0)


def _serve(connection: Connection, do: Callable[[Any], Any]) -> None:
    """Answer what one connection asks for until its other end is closed."""
    from nann.service.search_process.messages import dump, failure, load

    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[bool, Any] = (True, do(load(message)))
        except Exception as error:
            answer = (False, failure(error))
        with suppress(OSError):  # the server is gone: the next `recv_bytes` says so
            connection.send_bytes(dump(answer))


class _Worker:
    def __init__(self, *, gives_way: bool) -> None:
        self._gives_way = gives_way
        self._artifact: Artifact | None = None
        self._lanes: LocalLanes | None = None
        self._turns: list[threading.Lock] = []

    def search(self, number: int, packed: Any) -> Any:
        """The answers to one batch, the kernels launched, and the programs compiled so far."""
        from nann.engine.retrievers.retriever import silent
        from nann.service.search_process.messages import pack_answers, unpack_batch

        assert self._lanes is not None and self._artifact is not None
        lane = number % self._lanes.count
        batch = unpack_batch(packed, self._artifact.gate)
        with self._turns[lane]:
            answers, launches = self._lanes.search(batch, lane, silent)
        return pack_answers(answers), launches, self._lanes.n_compilations

    def do(self, asked: OpenLanes | None) -> Any:
        """Open what is asked for; asked for nothing, warm up what is open."""
        if asked is None:
            return self.gently(self._warm_up)
        if asked.scorer == "pjrt":
            self._make_client(asked.intra_op_threads)
        return self.gently(partial(self._open, asked))

    def _make_client(self, threads: int) -> None:
        """Make XLA's client, whose threads get the priority of the thread that makes it.

        Those for operations are the searches'. The others compile, and load what has been compiled.
        """
        from nann.engine.scoring.pjrt_client import PjrtDevice

        before = _threads()
        PjrtDevice.cpu(threads=threads, options={})
        if self._gives_way:
            for thread in _threads() - before:
                if _name(thread) != _XLA_OPERATIONS:
                    _give_way(thread)

    def _open(self, asked: OpenLanes) -> Opened:
        from nann.engine.artifacts import Artifact
        from nann.engine.devices import CPU, open_lanes
        from nann.engine.lanes import LocalLanes
        from nann.service.search_process.messages import Opened

        self._artifact = Artifact.open(asked.version_dir, verify=asked.verify)
        opened = open_lanes(
            self._artifact,
            (CPU,),
            scorer=asked.scorer,
            lanes=asked.lanes,
            max_batch=asked.max_batch,
            xla_cache_dir=asked.xla_cache_dir,
            intra_op_threads=asked.intra_op_threads,
            precision=asked.precision,
        )
        self._lanes = LocalLanes(self._artifact, opened.pairs)
        self._turns = [threading.Lock() for _ in range(self._lanes.count)]
        return Opened(self._lanes.takes_comm_seq)

    def _warm_up(self) -> tuple[bool, int]:
        assert self._lanes is not None
        bit_equal = self._lanes.warm_up()
        # What was loaded lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        return bit_equal, self._lanes.n_compilations

    def gently(self, work: Callable[[], T]) -> T:
        """Run `work` on a thread that gives way, if that was asked for: such a thread cannot go back."""
        if not self._gives_way:
            return work()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            _give_way(threading.get_native_id())
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="nann-load")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]


def _give_way(thread: int) -> None:
    """Have a thread run only where a processor has nothing else to do (SCHED_IDLE, or else low priority).

    Nobody waits for it: the interpreter is this process's own, which is why it may starve for a while.
    """
    with suppress(OSError, AttributeError):
        try:
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        except (OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, thread, _NICENESS)


def _threads() -> set[int]:
    """The numbers of this process's threads; none where Linux does not tell."""
    return {int(task.name) for task in _TASKS.iterdir()} if _TASKS.is_dir() else set()


def _name(thread: int) -> str:
    with suppress(OSError):  # it has ended
        return (_TASKS / str(thread) / "comm").read_text(encoding="utf-8", errors="replace").strip()
    return ""


def _import(scorer: str) -> None:
    """What takes a second of a processor's time before anything is opened."""
    for module in _COMMON:
        import_module(module)
    with suppress(ImportError):  # what opens a version says it
        for module in _OF_SCORER[scorer]:
            import_module(module)
