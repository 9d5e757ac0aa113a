"""Files of the operator's that may change while the server runs: keys and certificates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from nann.service.logs import get_logger
from nann.service.metrics import Metrics, WatchedFile
from nann.service.settings import SettingsError

__all__ = ["WatchedFiles"]

T = TypeVar("T")

log = get_logger(__name__)


class WatchedFiles(Generic[T]):
    """What some files say, read again when they have changed.

    What cannot be used is refused: one line in the log, a metric, and what was read before stays in force.
    Nothing polls: whoever needs the value asks `refresh`, which looks at the files at most every
    `pause_s`. Safe to use from several threads; two that refresh at a time do the same work.
    """

    def __init__(
        self,
        file: WatchedFile,
        paths: Sequence[Path],
        read: Callable[[], T],
        metrics: Metrics,
        *,
        pause_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises SettingsError, as `read` does, when the files cannot be used."""
        self._file = file
        self._paths = tuple(paths)
        self._read = read
        self._metrics = metrics
        self._pause_s = pause_s
        self._clock = clock
        self._looked_s = clock()
        self._seen = self._stamp()
        self.value = read()
        metrics.file_checked(file, refused=False)

    def refresh(self) -> T:
        """The newest value that the files held."""
        now_s = self._clock()
        if now_s - self._looked_s < self._pause_s:
            return self.value
        self._looked_s = now_s
        stamp = self._stamp()
        if stamp == self._seen:
            return self.value
        self._seen = stamp  # taken before the files are read: what changes meanwhile is read again
        try:
            self.value = self._read()
        except SettingsError as error:
            self._metrics.file_checked(self._file, refused=True)
            log.error(
                "a changed file is not used, what it said before holds", file=self._file, error=str(error)
            )
        else:
            self._metrics.file_checked(self._file, refused=False)
            log.info("a changed file is used from now on", file=self._file)
        return self.value

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Inode, time and size of each: another file under the name (a Secret's link) is a change, too."""
        stamps = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError:  # in the middle of being replaced, or gone
                stamps.append((0, 0, 0))
            else:
                stamps.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(stamps)
