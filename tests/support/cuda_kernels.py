"""The engine's kernels, compiled for the CPU with the block sizes a test asks for."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from cuda_shim import Program, compile_program
from cuda_shim.program import DEFAULT_SHARED_BYTES, DeviceBytes, Kernel

from nann.engine.cuda.modules import BlockSizes, source

__all__ = ["REAL", "SMALL", "Device", "bitmaps", "items_of", "keys_of", "program", "sets"]

# Small blocks make many blocks, pieces and rounds out of little work.
SMALL = BlockSizes(
    expand_block=32,
    gate_block=32,
    gate_sums=4,
    gather_block=32,
    gather_rows=16,
    merge_block=64,
    sort_piece=64,
    filter_block=32,
    scan_tile=32,
)
REAL = BlockSizes()


@functools.cache
def program(file: str, sizes: BlockSizes) -> Program:
    """One `.cu` file as it is given to CuPy, for the CPU."""
    return compile_program(source(file), sizes.options())


class Device:
    """Memory for kernels that read addresses of arrays from memory; freed, and looked at, on leaving."""

    def __init__(self) -> None:
        self._held: list[DeviceBytes] = []

    def put(self, array: np.ndarray) -> tuple[np.uint64, np.ndarray]:
        """A copy of an array: its address, and the copy as the kernels see it."""
        memory = DeviceBytes(array.nbytes)
        view = memory.view(array.shape, array.dtype)
        view[...] = array
        self._held.append(memory)
        return np.uint64(memory.address), view

    def run(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        block: int,
        arguments: Sequence[np.ndarray | np.generic | None],
        *,
        shared_bytes: int,
        seed: int = 0,
    ) -> None:
        """Run a kernel on copies of arrays, which come back; None is a null pointer."""
        copies = {id(a): (a, *self.put(a)) for a in arguments if isinstance(a, np.ndarray)}
        values: list[np.generic] = []
        for parameter, argument in zip(kernel.signature.parameters, arguments, strict=True):
            if argument is None:
                values.append(np.uint64(0))
            elif isinstance(argument, np.ndarray):
                values.append(kernel.check_pointer(parameter, int(copies[id(argument)][1]), argument.dtype))
            else:
                values.append(kernel.check_scalar(parameter, argument))
        kernel.check_sizes(grid, (block,), shared_bytes, DEFAULT_SHARED_BYTES)
        kernel.launch(grid, (block,), values, shared_bytes=shared_bytes, seed=seed)
        for array, _, view in copies.values():
            array[...] = view

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        for memory in self._held:
            memory.free()


def keys_of(scores: np.ndarray, items: np.ndarray, expanded: np.ndarray | int = 0) -> np.ndarray:
    """Keys by the definition at the top of `common.cuh`."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)
    up = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (
        (~up).astype(np.uint64) << np.uint64(32)
        | items.astype(np.uint64) << np.uint64(1)
        | np.uint64(expanded)
    )


def items_of(keys: np.ndarray) -> np.ndarray:
    return ((keys & np.uint64(0xFFFFFFFF)) >> np.uint64(1)).astype(np.int32)


def bitmaps(visited: list[set[int]], words: int) -> np.ndarray:
    """Sets of items as bitmaps, uint32 [batch, words]."""
    out = np.zeros((len(visited), words), np.uint32)
    for b, items in enumerate(visited):
        for item in items:
            out[b, item // 32] |= np.uint32(1 << item % 32)
    return out


def sets(bitmap: np.ndarray) -> list[set[int]]:
    """The inverse of `bitmaps`."""
    bits = np.unpackbits(np.ascontiguousarray(bitmap).view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]
