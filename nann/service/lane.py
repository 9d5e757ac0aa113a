"""One thread that runs one blocking call at a time and tells the event loop when it is done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

__all__ = ["Lane"]

Job = Callable[[], None]
T = TypeVar("T")


class Lane:
    """A daemon thread owned by an event loop.

    An executor would do, but its threads are joined at exit: a call that never returns (a device
    that hangs) would then keep a process alive that has been told to go.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._unfinished = 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """True from `run` until its `on_done` is called."""
        return self._unfinished > 0

    def run(self, job: Job, on_done: Callable[[BaseException | None], None]) -> None:
        """Run `job` on the thread, then `on_done(its exception or None)` on the event loop."""

        def finish(error: BaseException | None) -> None:
            self._unfinished -= 1
            on_done(error)

        self._unfinished += 1
        self._jobs.put(lambda: self._report(finish, _outcome(job)))

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the thread and return what it returns or raise what it raises."""
        done: asyncio.Future[T] = self._loop.create_future()
        results: list[T] = []

        def finish(error: BaseException | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(results[0])

        self.run(lambda: results.append(function()), finish)
        return await done

    def close(self) -> None:
        """Let the thread end after the jobs it has; does not wait."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # with all it refers to, which may be the last of a version that is unloaded

    def _report(self, finish: Callable[[BaseException | None], None], error: BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(finish, error)
        except RuntimeError:
            # The loop was closed while a job was still running: nobody is left to hear of it.
            if not self._loop.is_closed():
                raise


def _outcome(job: Job) -> BaseException | None:
    try:
        job()
    except BaseException as error:
        return error
    return None
