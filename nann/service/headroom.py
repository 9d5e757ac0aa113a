"""Whether there is memory for one more version beside those that serve.

A swap needs both versions for a while. Running out of memory then does not fail the load: the kernel
(or the pod's limit) kills the process, and the version that served well goes with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from nann.service.errors import NotEnoughMemory

__all__ = ["available_bytes", "check_headroom"]

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP_V2: Final = Path("/sys/fs/cgroup")
_CGROUP_V1: Final = Path("/sys/fs/cgroup/memory")
# A limit of cgroup v1 above this means that there is none (it counts pages in 63 bits).
_NO_LIMIT_BYTES: Final = 1 << 60


def check_headroom(needed_bytes: int, available: int | None) -> None:
    """Raise NotEnoughMemory when `needed_bytes` are more than there are (None: nobody knows)."""
    if available is not None and needed_bytes > available:
        raise NotEnoughMemory(
            f"loading needs about {_mib(needed_bytes)} MiB and {_mib(available)} MiB are free; free some, "
            "raise the limit, or swap with unload-first"
        )


def available_bytes(
    *, meminfo: Path = _MEMINFO, cgroup_v2: Path = _CGROUP_V2, cgroup_v1: Path = _CGROUP_V1
) -> int | None:
    """Bytes that this process may still take: the machine's, or its container's where that is less.

    None where the system tells neither.
    """
    known = [
        free
        for free in (
            _machine_free(meminfo),
            _container_free(cgroup_v2, "memory.max", "memory.current", "inactive_file"),
            _container_free(
                cgroup_v1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            ),
        )
        if free is not None
    ]
    return min(known, default=None)


def _machine_free(meminfo: Path) -> int | None:
    kib = _fields(meminfo).get("MemAvailable:")
    return None if kib is None else kib << 10


def _container_free(directory: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    limit, usage = _number(directory / limit_name), _number(directory / usage_name)
    if limit is None or usage is None or limit >= _NO_LIMIT_BYTES:
        return None
    # Clean file pages count as used, and are given up before anyone is killed.
    reclaimable = _fields(directory / "memory.stat").get(cache_name, 0)
    return max(0, limit - usage + reclaimable)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max": no limit
        return None


def _fields(path: Path) -> dict[str, int]:
    """``name number …`` lines; empty when there is no such file."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {parts[0]: int(parts[1]) for parts in words if len(parts) > 1 and parts[1].isdigit()}


def _mib(n_bytes: int) -> int:
    return n_bytes >> 20
