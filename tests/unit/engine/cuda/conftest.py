"""The stand-in for CuPy, for the tests of this folder."""

from __future__ import annotations

from cuda_shim.fixtures import fake_cupy

__all__ = ["fake_cupy"]
