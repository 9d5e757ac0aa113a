"""Ways to damage a published version, and to make a damaged one look untouched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nann.engine.artifacts import hash_files, read_manifest, write_manifest

__all__ = ["edit_manifest", "flip_byte", "reseal", "rewrite", "truncate"]


def flip_byte(path: Path, position: int = -1) -> None:
    """Change one byte, so that the size stays."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def truncate(path: Path, n_bytes: int = 1) -> None:
    """Cut bytes off the end."""
    path.write_bytes(path.read_bytes()[:-n_bytes])


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace an array by what `change` makes of it."""
    np.save(path, change(np.load(path)))


def reseal(directory: Path) -> None:
    """Hash the files as they are now: the version of a faulty builder, not of a faulty disk."""
    manifest = read_manifest(directory)
    write_manifest(directory, manifest.model_copy(update={"files": hash_files(directory)}))


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest's JSON by hand."""
    path = directory / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
