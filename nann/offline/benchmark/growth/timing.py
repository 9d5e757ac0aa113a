"""Wall time and processor time of a piece of work; the second says more on a machine that others use too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["measured"]


@contextmanager
def measured(figures: dict[str, Any], name: str) -> Iterator[None]:
    """Add ``<name>_s`` and ``<name>_cpu_s``: wall time, and processor time of this process's threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    figures[f"{name}_s"] = time.perf_counter() - wall
    figures[f"{name}_cpu_s"] = time.process_time() - cpu
