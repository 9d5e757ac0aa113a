"""What Linux tells of a running process: its memory, its open files, and how busy it keeps the machine."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BusyClock", "ProcessFigures", "process_figures"]


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """One look at a process."""

    resident_bytes: int
    cpu_s: float
    open_files: int
    threads: int

    @property
    def resident_mib(self) -> float:
        return self.resident_bytes / 2**20


def process_figures(pid: int) -> ProcessFigures:
    """The figures of /proc (man 5 proc), of a process and those it has started, together.

    Raises:
        OSError: the process is gone.
    """
    found = [_figures(pid)]
    for child in _children(pid):
        with suppress(OSError):  # gone meanwhile
            found.append(process_figures(child))
    return ProcessFigures(*(sum(getattr(one, name) for one in found) for name in ProcessFigures.__slots__))


def _figures(pid: int) -> ProcessFigures:
    place = Path("/proc", str(pid))
    # The name of the program comes second, in brackets, and may hold anything.
    fields = (place / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    # Time of its own, and of children that have ended.
    ticks, threads = sum(map(int, fields[11:15])), int(fields[17])
    resident_pages = int((place / "statm").read_text(encoding="ascii").split()[1])
    return ProcessFigures(
        resident_bytes=resident_pages * os.sysconf("SC_PAGE_SIZE"),
        cpu_s=ticks / os.sysconf("SC_CLK_TCK"),
        open_files=sum(1 for _ in (place / "fd").iterdir()),
        threads=threads,
    )


def _children(pid: int) -> list[int]:
    lists = Path("/proc", str(pid), "task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text(encoding="ascii").split()]


class BusyClock:
    """How many processors another process and this one have kept busy since it was made."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._started = (time.perf_counter(), process_figures(pid).cpu_s, time.process_time())

    def read(self) -> tuple[float, float]:
        """Processors kept busy by the other process, and by this one."""
        wall_s, other_s, own_s = self._started
        seconds = max(time.perf_counter() - wall_s, 1e-9)
        other = (process_figures(self._pid).cpu_s - other_s) / seconds
        return other, (time.process_time() - own_s) / seconds
