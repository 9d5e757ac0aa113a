"""On what a measurement was made: without it, its figures say nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

__all__ = ["Machine"]

_PACKAGES = ("nann", "numpy", "numba", "tensorflow")


@dataclass(frozen=True, slots=True)
class Machine:
    """Processor, cores this process may use, memory, software versions, the code's commit, and when.

    `commit` ends in ``+changes`` for a working tree that differs from it, and is None outside a
    repository. `load_average` is that of the last minute before the measurement, by other work too.
    """

    processor: str
    cores: int
    memory_gib: float
    load_average: float
    system: str
    python: str
    versions: dict[str, str]
    commit: str | None
    measured_at: str

    @classmethod
    def here(cls) -> Machine:
        """This machine, now."""
        return cls(
            processor=_processor(),
            cores=len(os.sched_getaffinity(0)),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            load_average=round(os.getloadavg()[0], 2),
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            versions={name: version for name in _PACKAGES if (version := _version(name)) is not None},
            commit=_commit(Path(__file__).resolve().parent),
            measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def line(self) -> str:
        """All of it in one line."""
        versions = " ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.processor}, {self.cores} cores, {self.memory_gib:g} GiB, load {self.load_average:g}; "
            f"{self.system}, Python {self.python}, {versions}; commit {self.commit or 'unknown'}; "
            f"{self.measured_at}"
        )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(directory: Path) -> str | None:
    # An installed copy may lie inside somebody else's repository, whose commit says nothing of ours.
    if _git(directory, "rev-parse", "--show-prefix") != "nann/offline/benchmark/":
        return None
    commit = _git(directory, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if _git(directory, "status", "--porcelain", "-uno") else "")


def _git(directory: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
