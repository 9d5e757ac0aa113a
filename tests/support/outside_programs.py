"""Programs that tests run and that Python packages do not bring."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["outside_program"]


def outside_program(name: str, *, install: str) -> str:
    """The path of `name`. A machine without it skips the test, but CI, which installs them, fails it:
    what nobody runs would look tested."""
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is missing: {install}"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return path
