"""What the device can do at most: bytes copied and multiply-adds a second, as measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nann.offline.benchmark.gpu.programs import Precision

__all__ = ["Ceilings", "measure_ceilings"]

_REPEATS = 10


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Median rates. `copy_bytes_per_s` counts bytes read and bytes written; `matmul_flops` counts a
    multiply-add as two."""

    copy_bytes_per_s: float
    matmul_flops: float
    copy_bytes: int
    matmul_size: int
    matmul_dtype: str


def measure_ceilings(
    *, copy_bytes: int, matmul_size: int, matmul_dtype: Precision, device: Any = None
) -> Ceilings:
    """Copy `copy_bytes` and multiply two matrices of `matmul_size`², on random data, through JAX."""
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    words = jax.device_put(rng.integers(0, 2**31, copy_bytes // 4, dtype=np.int32), device)
    # XLA would leave a plain copy out; a negation moves the same bytes.
    copy_s = _median_s(jax.jit(jnp.negative), words)
    left, right = (
        jax.device_put(
            rng.standard_normal((matmul_size, matmul_size), np.float32).astype(matmul_dtype), device
        )
        for _ in range(2)
    )
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(matmul_dtype))
    matmul_s = _median_s(product, left, right)
    return Ceilings(
        2 * words.nbytes / copy_s, 2 * matmul_size**3 / matmul_s, words.nbytes, matmul_size, matmul_dtype
    )


def _median_s(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call, when several are enqueued at a time."""
    for _ in range(2):
        function(*arguments).block_until_ready()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        outputs = [function(*arguments) for _ in range(4)]
        for output in outputs:
            output.block_until_ready()
        times.append((time.perf_counter() - started) / len(outputs))
        del outputs
    return statistics.median(times)
