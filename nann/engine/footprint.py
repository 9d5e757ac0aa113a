"""How much memory a version will take, told from its manifest before anything of it is read."""

from __future__ import annotations

from typing import Final

from nann.engine.artifacts import GATE_QUERIES, Manifest

__all__ = ["expected_load_bytes"]

# A second version of Brunch (226,337 items: 160 MB of tables, 32 MB of weights) took 200 MB of anonymous
# memory at its peak, one of MovieLens 1M (6 MB, 1 MB) 20 MB: the tables once, the weights up to twice (read,
# then copied into variables). A version that compiles leaves up to 85 MB of programs besides.
_COPIES_OF_WEIGHTS: Final = 2
_PROGRAMS_BYTES: Final = 96 << 20
# Titles and categories are dictionaries once read; Parquet keeps them several times smaller.
_PARQUET_EXPANSION: Final = 8
_GATE_EXPANSION: Final = 2  # half precision in the file, float32 in a copy on the CPU


def expected_load_bytes(manifest: Manifest, *, lanes: int, max_batch: int) -> int:
    """Bytes of anonymous memory that loading and serving a version takes at its peak.

    Mapped files are left out: the kernel drops their pages when it needs the room.
    """
    tables = weights = attributes = 0
    for name, entry in manifest.files.items():
        if name.startswith("variables/"):
            weights += entry.bytes
        elif name.endswith(".parquet"):
            attributes += entry.bytes
        elif name == f"arrays/{GATE_QUERIES}":
            tables += _GATE_EXPANSION * entry.bytes
        elif name in _COPIED or name.startswith("arrays/item_state_"):
            tables += entry.bytes
    visited = lanes * max_batch * manifest.num_items // 8
    return tables + _COPIES_OF_WEIGHTS * weights + _PARQUET_EXPANSION * attributes + visited + _PROGRAMS_BYTES


# `SearchEngine` copies these out of their mapping.
_COPIED: Final = frozenset({"arrays/neighbors_level_0.npy", "arrays/neighbors_level_1.npy"})
