"""What Linux tells of a running process: its memory, its open files, and how busy it keeps the machine."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nann.service.search_process.usage import process_usage

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
    usage = process_usage(pid)
    if usage is None:
        raise ProcessLookupError(f"no process {pid}")
    return ProcessFigures(
        resident_bytes=usage.resident_bytes,
        cpu_s=usage.cpu_s + usage.ended_children_cpu_s,
        open_files=sum(1 for _ in Path("/proc", str(pid), "fd").iterdir()),
        threads=usage.threads,
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
