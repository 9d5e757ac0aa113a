"""A real GPU, or with ``NANN_GPU_TESTS=shim`` the stand-in for CuPy, with XLA on the CPU.

Without either these tests are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from gpu_place import Place, real_place, shim_place


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def place() -> Iterator[Place]:
    """Where the tests of this folder run."""
    with _place() as found:
        yield found


@contextmanager
def _place() -> Iterator[Place]:
    if os.environ.get("NANN_GPU_TESTS") == "shim":
        with shim_place() as place:
            yield place
        return
    place_or_why = real_place()
    if isinstance(place_or_why, str):
        pytest.skip(place_or_why)
    yield place_or_why
