"""XLA reads its flags at a process's first compilation, so the scorers' flag is set before any test runs."""

from __future__ import annotations

from cuda_shim.fixtures import fake_cupy

from nann.engine.scoring import tensorflow_scorer

__all__ = ["fake_cupy"]

tensorflow_scorer._add_flag("XLA_FLAGS", tensorflow_scorer._BIT_EQUAL_FLAG)
