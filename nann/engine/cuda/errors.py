"""Every failure of CuPy or CUDA as a `BackendError` that names the operation."""

from __future__ import annotations

from types import TracebackType

from nann.engine.errors import BackendError, DeviceLost

__all__ = ["device_errors"]

# cudaError_t after which every call of this process on the device fails: those of which driver_types.h says
# that the process must be terminated and relaunched, and those that say the device or its context is gone.
# The driver's CUresult has the same numbers.
_LOST = {
    4: "the driver is shutting down",
    214: "an uncorrectable ECC error",
    220: "an uncorrectable NVLink error",
    226: "a contained hardware error",
    700: "an illegal address",
    702: "a kernel ran too long",
    709: "the context was destroyed",
    710: "an assertion in a kernel",
    714: "a hardware stack error",
    715: "an illegal instruction",
    716: "a misaligned address",
    717: "an invalid address space",
    718: "an invalid program counter",
    719: "a kernel failed",
    721: "a tensor memory leak",
    810: "the MPS client was terminated",
}
_OUT_OF_MEMORY = 2
_TOO_LONG = 600  # of a compiler's message, whose first lines name the error


class device_errors:  # noqa: N801 (reads as the verb of a `with`)
    """Turns what CuPy and CUDA raise inside the block into `BackendError`; other exceptions pass.

    ``operation`` says what was being done. A class, not a generator: it stands around every launch.
    """

    __slots__ = ("_operation",)

    def __init__(self, operation: str) -> None:
        self._operation = operation

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and (translated := _translated(self._operation, error)) is not None:
            raise translated from error


def _translated(operation: str, error: BaseException) -> BackendError | None:
    import cupy

    if isinstance(error, cupy.cuda.memory.OutOfMemoryError):  # says how much was asked for
        return BackendError(f"{operation}: {error}")
    kinds = (
        cupy.cuda.runtime.CUDARuntimeError,
        cupy.cuda.driver.CUDADriverError,
        cupy.cuda.compiler.CompileException,
    )
    if not isinstance(error, kinds):
        return None
    status = getattr(error, "status", None)
    if status in _LOST:
        return DeviceLost(f"{operation}: device lost, {_LOST[status]} ({error})")
    if status == _OUT_OF_MEMORY:
        return BackendError(f"{operation}: out of memory ({error})")
    text = str(error).strip()
    return BackendError(f"{operation}: {text[:_TOO_LONG]}{'…' if len(text) > _TOO_LONG else ''}")
