"""JAX's half of the argument for lending a buffer once: a program reads what memory holds when it runs."""

from __future__ import annotations

import numpy as np

ROWS, DIM = 64, 16


def aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    raw = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + raw.size - 64].view(dtype).reshape(shape)


def test_a_view_made_once_shows_every_program_what_was_written_since() -> None:
    import jax
    import jax.dlpack
    import jax.numpy as jnp

    items = aligned((ROWS, DIM), np.float16)
    view = jax.dlpack.from_dlpack(items, copy=False)
    assert view.unsafe_buffer_pointer() == items.ctypes.data

    def score(users: jax.Array, rows: jax.Array) -> jax.Array:
        return rows.astype(jnp.float32) @ users

    users = jnp.arange(DIM, dtype=jnp.float32)
    program = jax.jit(score).lower(users, view).compile()
    rng = np.random.default_rng(0)
    for _ in range(5):
        items[:] = rng.integers(-3, 4, items.shape)
        found = program(users, view).block_until_ready()
        np.testing.assert_array_equal(np.asarray(found), items.astype(np.float32) @ np.arange(DIM))


def test_jax_narrows_64_bit_arrays_so_they_may_not_be_lent() -> None:
    import jax.dlpack

    wide = aligned((8,), np.int64)
    lent = jax.dlpack.from_dlpack(wide, copy=False)
    assert lent.dtype == np.int32
    assert lent.unsafe_buffer_pointer() != wide.ctypes.data
