"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["copy_file", "link_or_copy", "staged_directory"]


@contextmanager
def staged_directory(output: Path, *, mark: str) -> Iterator[Path]:
    """An empty directory beside `output` that takes its place when the block ends well.

    An earlier `output` is replaced if it is empty or holds a file named `mark`, which says that the
    same command wrote it.

    Raises:
        FileExistsError: `output` is something else.
    """
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / mark).exists())):
        raise FileExistsError(f"{output} exists and holds something else (no {mark}); name another output")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.parent / f".{output.name}.writing-{os.getpid()}"
    replaced = output.parent / f".{output.name}.replaced-{os.getpid()}"
    staging.mkdir()
    try:
        yield staging
        if output.exists():
            output.rename(replaced)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy across file systems. Only for files that are never written in place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content and see it on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
