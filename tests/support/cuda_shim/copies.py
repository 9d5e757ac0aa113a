"""Asynchronous copies and fills on the machine's streams, as cudaMemcpyAsync and its family treat them.

Pinned host memory is read and written when the copy's turn comes. Pageable memory is read at once (CUDA
stages it), and a copy into it returns only when it is done (CUDA Runtime API, "API synchronization
behavior").
"""

from __future__ import annotations

import ctypes

from cuda_shim.errors import CUDARuntimeError, Misuse
from cuda_shim.machine import Machine, Queue
from cuda_shim.program import describe

HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, DEFAULT = range(5)
_SIDES = {
    HOST_TO_HOST: (False, False),
    HOST_TO_DEVICE: (True, False),
    DEVICE_TO_HOST: (False, True),
    DEVICE_TO_DEVICE: (True, True),
}


def copy(machine: Machine, dst: int, src: int, nbytes: int, kind: int, queue: Queue) -> None:
    """cudaMemcpyAsync."""
    copy_rows(machine, dst, nbytes, src, nbytes, nbytes, 1, kind, queue)


def copy_rows(
    machine: Machine,
    dst: int,
    dst_pitch: int,
    src: int,
    src_pitch: int,
    width: int,
    height: int,
    kind: int,
    queue: Queue,
) -> None:
    """cudaMemcpy2DAsync: `height` rows of `width` bytes, whose starts lie a pitch apart.

    Raises:
        CUDARuntimeError: a row is wider than a pitch.
        Misuse: a side is not the memory that `kind` says, or not live throughout.
    """
    if width < 0 or height < 0 or (height > 1 and (width > dst_pitch or width > src_pitch)):
        raise CUDARuntimeError(1)
    if not width or not height:
        return
    with machine.lock:
        machine.collect()
        _check(machine, "destination", dst, (height - 1) * dst_pitch + width, kind, 0)
        _check(machine, "source", src, (height - 1) * src_pitch + width, kind, 1)
        pageable_dst = machine.space.find(dst) is None
        staged: list[bytes] | None = None
        if machine.space.find(src) is None:
            staged = [ctypes.string_at(src + row * src_pitch, width) for row in range(height)]

        def run() -> None:
            for row in range(height):
                target = dst + row * dst_pitch
                if not pageable_dst:
                    _live(machine, "destination", target, width)
                if staged is not None:
                    ctypes.memmove(target, staged[row], width)
                else:
                    _live(machine, "source", src + row * src_pitch, width)
                    ctypes.memmove(target, src + row * src_pitch, width)

        machine.counts["copies"] += 1
        operation = machine.enqueue(queue, "copy", run)
        if pageable_dst:
            machine.synchronize([operation])


def fill(machine: Machine, dst: int, value: int, nbytes: int, queue: Queue) -> None:
    """cudaMemsetAsync: every byte becomes `value`."""
    if not nbytes:
        return
    with machine.lock:
        machine.collect()
        _check(machine, "destination", dst, nbytes, DEVICE_TO_DEVICE, 0)

        def run() -> None:
            _live(machine, "destination", dst, nbytes)
            ctypes.memset(dst, value & 0xFF, nbytes)

        machine.counts["fills"] += 1
        machine.enqueue(queue, "fill", run)


def _check(machine: Machine, what: str, address: int, nbytes: int, kind: int, side: int) -> None:
    start = machine.space.find(address)
    if start is not None and machine.space.find(address, nbytes) is None:
        raise machine.violation(
            Misuse(f"the {what} of a copy of {nbytes} bytes runs out of {describe(address)}")
        )
    if kind == DEFAULT:
        return
    on_device = start is not None and start.device is not None
    if on_device != _SIDES[kind][side]:
        where = "device" if on_device else "pinned host" if start is not None else "pageable host or freed"
        raise machine.violation(Misuse(f"the {what} of a copy of kind {kind} is {where} memory"))


def _live(machine: Machine, what: str, address: int, nbytes: int) -> None:
    if machine.space.find(address, nbytes) is None:
        raise Misuse(f"the {what} of a copy had been released when its turn came: {describe(address)}")
