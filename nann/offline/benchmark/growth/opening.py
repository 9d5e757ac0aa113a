"""What it takes to verify and map a version, from a cold and a warm page cache, and at what rates."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nann.engine.artifacts import Artifact, Verify

__all__ = ["forget_files", "measure_opening"]

_BLOCK_BYTES = 1 << 22
_HASHED_BYTES = 1 << 30  # half a second and more of SHA-256
_WARM_ROUNDS = 3


def measure_opening(version: Path) -> dict[str, Any]:
    """Seconds (wall and processor) of `Artifact.open` both ways, and what the machine hashes and reads.

    `cold` drops the version's pages from the page cache first; `warm` finds all of them there. The rates
    are of all cores at once, `hash_cpu_bytes_per_s` of a second of processor time.
    """
    files = [path for path in version.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    figures: dict[str, Any] = {"bytes": total, **_hash_rates()}
    forget_files(version)
    figures["disk_bytes_per_s"] = total / _timed(lambda: _read(files))["wall_s"]
    forget_files(version)
    figures["full_cold"] = _open(version, "full")
    figures["full_warm"] = _open(version, "full")
    figures["fast_warm"] = _median([_open(version, "fast") for _ in range(_WARM_ROUNDS)])
    forget_files(version)
    figures["fast_cold"] = _open(version, "fast")
    return figures


def _open(version: Path, verify: Verify) -> dict[str, float]:
    return _timed(lambda: Artifact.open(version, verify=verify))


def _timed(action: Any) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def _median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def forget_files(version: Path) -> None:
    """Drop the version's files from the page cache, as far as nothing maps them."""
    for path in version.rglob("*"):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a page that is not on disk yet stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _hash_rates() -> dict[str, float]:
    """Bytes that SHA-256 takes from memory, a second and a second of processor time."""
    cores = len(os.sched_getaffinity(0))
    block = np.random.default_rng(0).bytes(_BLOCK_BYTES)

    def one(_: int) -> None:
        digest = hashlib.sha256()
        for _ in range(_HASHED_BYTES // _BLOCK_BYTES):
            digest.update(block)

    with ThreadPoolExecutor(cores) as pool:
        taken = _timed(lambda: list(pool.map(one, range(cores))))
    total = cores * _HASHED_BYTES
    return {
        "hash_bytes_per_s": total / taken["wall_s"],
        "hash_cpu_bytes_per_s": total / taken["cpu_s"],
    }


def _read(files: list[Path]) -> None:
    """Read every file to its end, as many at a time as there are cores."""

    def one(path: Path) -> None:
        buffer = bytearray(_BLOCK_BYTES)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(one, sorted(files, key=lambda path: -path.stat().st_size)))
