"""What Linux tells of a process: its memory, its processor time, its threads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ProcessUsage", "process_usage"]


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """Resident memory, processor time since its start, and that of children that have ended."""

    resident_bytes: int
    cpu_s: float
    ended_children_cpu_s: float
    threads: int


def process_usage(pid: int) -> ProcessUsage | None:
    """The usage of a process, from /proc (man 5 proc); None where there is no /proc, or no such process."""
    place = Path("/proc", str(pid))
    try:
        # The name of the program comes second, in brackets, and may hold anything.
        fields = (place / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        resident_pages = int((place / "statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return None
    user, system, children_user, children_system = (int(field) for field in fields[11:15])
    ticks_s = os.sysconf("SC_CLK_TCK")
    return ProcessUsage(
        resident_bytes=resident_pages * os.sysconf("SC_PAGE_SIZE"),
        cpu_s=(user + system) / ticks_s,
        ended_children_cpu_s=(children_user + children_system) / ticks_s,
        threads=int(fields[17]),
    )
