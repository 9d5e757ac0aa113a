"""`cupy.cuda.runtime`, as far as our code uses it (runtime.pyx, version 14)."""

from __future__ import annotations

from typing import Any, NoReturn

from cuda_shim import copies
from cuda_shim.errors import INVALID_DEVICE, CUDARuntimeError, Misuse
from cuda_shim.machine import LEGACY, PER_THREAD, active
from cuda_shim.streams import Device, get_device_id, set_device

__all__ = [
    "CUDARuntimeError",
    "deviceGetAttribute",
    "deviceGetPCIBusId",
    "deviceSynchronize",
    "driverGetVersion",
    "errorInvalidValue",
    "errorMemoryAllocation",
    "getDevice",
    "getDeviceCount",
    "getDeviceProperties",
    "hostAllocDefault",
    "hostAllocMapped",
    "hostAllocPortable",
    "is_hip",
    "memGetInfo",
    "memcpy",
    "memcpy2DAsync",
    "memcpyAsync",
    "memcpyDefault",
    "memcpyDeviceToDevice",
    "memcpyDeviceToHost",
    "memcpyHostToDevice",
    "memcpyHostToHost",
    "memset",
    "memsetAsync",
    "runtimeGetVersion",
    "setDevice",
    "streamLegacy",
    "streamPerThread",
    "streamSynchronize",
]

# driver_types.h: cudaMemcpyKind, cudaHostAlloc*, cudaError, cudaStreamLegacy, cudaStreamPerThread.
memcpyHostToHost, memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice, memcpyDefault = range(5)
hostAllocDefault, hostAllocPortable, hostAllocMapped = 0, 1, 2
errorInvalidValue, errorMemoryAllocation = 1, 2
streamLegacy, streamPerThread = LEGACY, PER_THREAD
is_hip = False

getDevice, setDevice = get_device_id, set_device


def driverGetVersion() -> int:
    """Of CUDA 12.8."""
    return 12080


def runtimeGetVersion() -> int:
    """Of CUDA 12.8."""
    return 12080


def getDeviceCount() -> int:
    """As installed; CUDA itself raises where there is none (cudaErrorNoDevice)."""
    return len(active().devices)


def getDeviceProperties(device: int) -> dict[str, Any]:
    """The properties our code reads, of an H100 with the installed amount of memory."""
    machine = active()
    if not 0 <= device < len(machine.devices):
        raise CUDARuntimeError(INVALID_DEVICE)
    return {
        "name": b"Shim (CPU)",
        "totalGlobalMem": machine.devices[device].budget.total,
        "major": 9,
        "minor": 0,
        "warpSize": 32,
        "maxThreadsPerBlock": 1024,
        "maxThreadsDim": (1024, 1024, 64),
        "maxGridSize": (2**31 - 1, 65535, 65535),
        "multiProcessorCount": 132,
        "sharedMemPerBlock": 48 * 1024,
        "sharedMemPerBlockOptin": 227 * 1024,
        "l2CacheSize": 50 << 20,
        "unifiedAddressing": 1,
        "canMapHostMemory": 1,
        "pciBusID": device,
        "pciDeviceID": 0,
        "pciDomainID": 0,
        "uuid": bytes([device] * 16),
    }


def deviceGetAttribute(attrib: int, device: int) -> int:
    """By the number of cudaDeviceAttr."""
    known = {
        1: 1024,
        8: 48 * 1024,
        10: 32,
        16: 132,
        75: 9,
        76: 0,
        97: 227 * 1024,
    }
    active().device(device)
    if attrib not in known:
        raise Misuse(f"the shim does not know device attribute {attrib}")
    return known[attrib]


def deviceGetPCIBusId(device: int) -> str:
    """As nvidia-smi prints it."""
    return Device(device).pci_bus_id


def deviceSynchronize() -> None:
    """Runs all work of the current device."""
    Device().synchronize()


def memGetInfo() -> tuple[int, int]:
    """Free and total bytes of the current device."""
    return Device().mem_info


def streamSynchronize(stream: int) -> None:
    """Runs all work of a stream."""
    machine = active()
    machine.synchronize_queue(machine.queue(stream))


def memcpyAsync(dst: int, src: int, size: int, kind: int, stream: int) -> None:
    """See copies.copy."""
    machine = active()
    copies.copy(machine, dst, src, size, kind, machine.queue(stream))


def memcpy2DAsync(
    dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: int, stream: int
) -> None:
    """See copies.copy_rows; sizes in bytes."""
    machine = active()
    copies.copy_rows(machine, dst, dpitch, src, spitch, width, height, kind, machine.queue(stream))


def memsetAsync(ptr: int, value: int, size: int, stream: int) -> None:
    """See copies.fill."""
    machine = active()
    copies.fill(machine, ptr, value, size, machine.queue(stream))


def memcpy(dst: int, src: int, size: int, kind: int) -> NoReturn:
    """On the default stream: refused."""
    raise active().violation(
        Misuse("memcpy runs on the default stream: use memcpyAsync on a stream of yours")
    )


def memset(ptr: int, value: int, size: int) -> NoReturn:
    """On the default stream: refused."""
    raise active().violation(
        Misuse("memset runs on the default stream: use memsetAsync on a stream of yours")
    )
