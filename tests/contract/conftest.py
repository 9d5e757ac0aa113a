"""XLA reads its flags at a process's first compilation, so the scorers' flag is set before any test runs."""

from __future__ import annotations

from nann.engine.scoring import tensorflow_scorer

tensorflow_scorer._add_flag("XLA_FLAGS", tensorflow_scorer._BIT_EQUAL_FLAG)
