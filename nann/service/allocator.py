"""Telling glibc's allocator how to treat tables that come and go with versions; elsewhere nothing happens.

By default it moves its bound between blocks from the heap and mapped ones up to what was freed last (at
most 32 MiB), so that from the second version on the tables lie among everything else, and their room
cannot be given back: 45 MB of Brunch's stayed behind at each swap.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

__all__ = ["give_back_free_memory", "keep_large_blocks_apart"]

_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_THRESHOLD: Final = -3
# Above the blocks that a search takes, below the tables of a catalogue worth serving. XLA's buffers of a full
# batch are larger than 8 MiB: mapped and cleared for each batch, they took a fifth of a lane's time.
_LARGE_BLOCK_BYTES: Final = 32 << 20


def keep_large_blocks_apart() -> None:
    """Map every large block by itself, from now on; call it before anything large is loaded."""
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BLOCK_BYTES)


def give_back_free_memory() -> None:
    """Return what is free to the system; takes some milliseconds."""
    malloc_trim = _libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _libc(name: str) -> Callable[..., Any] | None:
    """A function of the C library, None where it has none of that name (musl, macOS, Windows)."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None
