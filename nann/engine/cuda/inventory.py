"""Which NVIDIA GPUs this process can use. Asking takes no memory on any of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nann.engine.cuda.errors import device_errors
from nann.engine.errors import Unsupported

__all__ = ["CudaDevice", "bound_memory", "cuda_devices"]


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One GPU, numbered as CUDA numbers those that ``CUDA_VISIBLE_DEVICES`` leaves visible."""

    index: int
    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]

    def __str__(self) -> str:
        major, minor = self.compute_capability
        return f"{self.name}, {self.memory_bytes / 2**30:.0f} GiB, compute capability {major}.{minor}"


def cuda_devices() -> tuple[CudaDevice, ...]:
    """Every GPU that CUDA shows, at least one.

    Raises:
        Unsupported: there is none, or CuPy cannot be used; says why.
    """
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise Unsupported(f"cupy cannot be imported: {error}") from error
        raise Unsupported("cupy is not installed") from error
    except ImportError as error:
        raise Unsupported(f"cupy cannot be imported: {str(error).strip().splitlines()[0]}") from error
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise Unsupported(f"no CUDA device ({_driver(runtime)}: {error})") from error
    if not count:
        raise Unsupported(f"no CUDA device ({_driver(runtime)})")
    return tuple(_describe(runtime, index) for index in range(count))


def bound_memory(device: int, limit_bytes: int | None) -> None:
    """Let CuPy take at most so much of a GPU, for all that this process does there; None: all of it."""
    import cupy

    with device_errors(f"bounding memory on cuda:{device}"), cupy.cuda.Device(device):
        cupy.get_default_memory_pool().set_limit(size=limit_bytes or 0)


def _describe(runtime: Any, index: int) -> CudaDevice:
    properties = runtime.getDeviceProperties(index)
    name = properties["name"]
    return CudaDevice(
        index=index,
        name=name.decode() if isinstance(name, bytes) else name,
        memory_bytes=int(properties["totalGlobalMem"]),
        compute_capability=(int(properties["major"]), int(properties["minor"])),
    )


def _driver(runtime: Any) -> str:
    """The newest CUDA version the installed driver knows, which is what refusals are about."""
    try:
        version = int(runtime.driverGetVersion())
    except runtime.CUDARuntimeError:
        version = 0
    return f"driver for CUDA {version // 1000}.{version % 1000 // 10}" if version else "no driver"
