"""A compiled `.cu` text whose kernels run on the CPU, on guarded memory."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cuda_shim import build
from cuda_shim.source import Parameter, Signature, read_signatures

Dimensions = tuple[int, ...]

# CUDA C++ Programming Guide, "Features and Technical Specifications per Compute Capability".
MAX_THREADS = 1024
_MAX_BLOCK = (1024, 1024, 64)
_MAX_GRID = (2**31 - 1, 65535, 65535)
DEFAULT_SHARED_BYTES = 48 * 1024

_one_at_a_time = threading.RLock()


class KernelFault(AssertionError):
    """A kernel did what none may: the message names the kernel, and block, thread and line where known."""


class BadLaunch(ValueError):
    """An impossible launch: sizes beyond CUDA's limits, or arguments that do not fit the parameters."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a program."""

    signature: Signature
    entry: int
    max_threads: int

    def launch(
        self,
        grid: Dimensions,
        block: Dimensions,
        arguments: Sequence[np.generic],
        *,
        shared_bytes: int = 0,
        seed: int = 0,
        resident: int = 4,
        limit_s: float = 60.0,
    ) -> None:
        """Runs to the end on scalars and addresses (`uint64` for a pointer), then looks at all guards.

        Raises:
            KernelFault: see the class.
        """
        runtime = build.runtime()
        values = [np.asarray(value).copy() for value in arguments]
        addresses = (ctypes.c_void_p * max(len(values), 1))(*(value.ctypes.data for value in values))
        error = ctypes.create_string_buffer(2048)
        shape = ctypes.c_uint32 * 3
        with _one_at_a_time:
            failed = runtime.cuda_shim_launch(
                self.entry,
                self.signature.name.encode(),
                shape(*_three(grid)),
                shape(*_three(block)),
                shared_bytes,
                addresses,
                seed & (2**64 - 1),
                resident,
                limit_s,
                error,
                len(error),
            )
            if failed:
                raise KernelFault(_with_line(error.value.decode()))
            broken = runtime.cuda_shim_check()
            if broken:
                raise KernelFault(f"kernel {self.signature.name}: wrote just outside {describe(broken)}")

    def check_sizes(
        self, grid: Dimensions, block: Dimensions, shared_bytes: int, max_shared_bytes: int
    ) -> None:
        """Raises BadLaunch for sizes that cuLaunchKernel refuses."""
        name = self.signature.name
        for what, sizes, limits in (("grid", grid, _MAX_GRID), ("block", block, _MAX_BLOCK)):
            if not 1 <= len(sizes) <= 3 or any(not 1 <= n <= m for n, m in zip(sizes, limits, strict=False)):
                raise BadLaunch(f"{name}: a {what} of {sizes} (each from 1 to {limits})")
        threads = int(np.prod(block))
        if threads > min(self.max_threads, MAX_THREADS):
            raise BadLaunch(
                f"{name}: {threads} threads a block, at most {min(self.max_threads, MAX_THREADS)}"
            )
        if not 0 <= shared_bytes <= max_shared_bytes:
            raise BadLaunch(
                f"{name}: {shared_bytes} bytes of dynamic shared memory, allowed {max_shared_bytes}"
            )

    def check_count(self, arguments: Sequence[Any]) -> None:
        """Raises BadLaunch unless there are as many arguments as parameters."""
        expected = len(self.signature.parameters)
        if len(arguments) != expected:
            raise BadLaunch(f"{self.signature.name} takes {expected} arguments, given {len(arguments)}")

    def check_scalar(self, parameter: Parameter, value: Any) -> np.generic:
        """The scalar to give; raises BadLaunch unless it is a NumPy scalar of the parameter's width."""
        where = f"{self.signature.name}({parameter.c_type} {parameter.name})"
        if not isinstance(value, np.generic):
            raise BadLaunch(f"{where}: give a NumPy scalar of that width, not {type(value).__name__}")
        expected = parameter.dtype
        assert expected is not None
        if _unlike(value.dtype, expected):
            raise BadLaunch(f"{where}: given {value.dtype}")
        return value

    def check_pointer(self, parameter: Parameter, address: int, dtype: np.dtype[Any] | None) -> np.generic:
        """The address to give; raises BadLaunch where element type or alignment do not fit."""
        where = f"{self.signature.name}({parameter.c_type} {parameter.name})"
        expected = parameter.dtype
        if dtype is not None and expected is not None and _unlike(dtype, expected):
            raise BadLaunch(f"{where}: given an array of {dtype}")
        if address % parameter.alignment:
            raise BadLaunch(f"{where}: the address is not a multiple of {parameter.alignment}")
        return np.uint64(address)


@dataclass
class Program:
    """All kernels of one text; `program["name"]` is a Kernel."""

    kernels: dict[str, Kernel]
    _library: ctypes.CDLL = field(repr=False)

    def __getitem__(self, name: str) -> Kernel:
        return self.kernels[name]

    def run(
        self,
        name: str,
        grid: int | Dimensions,
        block: int | Dimensions,
        arguments: Sequence[Any],
        *,
        shared_bytes: int = 0,
        max_shared_bytes: int = DEFAULT_SHARED_BYTES,
        seed: int = 0,
        resident: int = 4,
    ) -> None:
        """Runs one kernel on copies of NumPy arrays, which come back unless the pointer is to const.

        An array given twice is one piece of memory to the kernel.

        Raises:
            BadLaunch, KernelFault: see the classes.
        """
        kernel = self.kernels[name]
        grid = (grid,) if isinstance(grid, int) else grid
        block = (block,) if isinstance(block, int) else block
        kernel.check_sizes(grid, block, shared_bytes, max_shared_bytes)
        kernel.check_count(arguments)
        copies: dict[int, DeviceBytes] = {}
        try:
            values: list[np.generic] = []
            for parameter, argument in zip(kernel.signature.parameters, arguments, strict=True):
                if not parameter.pointer:
                    values.append(kernel.check_scalar(parameter, argument))
                    continue
                if not isinstance(argument, np.ndarray) or not argument.flags.c_contiguous:
                    raise BadLaunch(f"{name}({parameter.name}): give a contiguous array")
                if id(argument) not in copies:
                    copies[id(argument)] = DeviceBytes(argument.nbytes)
                    copies[id(argument)].view(argument.shape, argument.dtype)[...] = argument
                values.append(kernel.check_pointer(parameter, copies[id(argument)].address, argument.dtype))
            kernel.launch(grid, block, values, shared_bytes=shared_bytes, seed=seed, resident=resident)
            for parameter, argument in zip(kernel.signature.parameters, arguments, strict=True):
                if parameter.pointer and parameter.written:
                    assert isinstance(argument, np.ndarray)
                    argument[...] = copies[id(argument)].view(argument.shape, argument.dtype)
        finally:
            for copy in copies.values():
                copy.free(check=False)  # launch() has looked, and what it says is worth more


class DeviceBytes:
    """One guarded allocation, poisoned when fresh."""

    def __init__(self, nbytes: int, poison: int = 0xA5) -> None:
        with _one_at_a_time:
            address = build.runtime().cuda_shim_alloc(nbytes, poison)
        if not address:
            raise MemoryError(f"the shim could not map {nbytes} bytes")
        self.address: int = address
        self.nbytes = nbytes

    def view(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The memory as an array of this machine: what a kernel sees, now."""
        return host_view(self.address, shape, dtype)

    def free(self, *, check: bool = True) -> None:
        """Closes the memory; raises KernelFault if something had been written around it."""
        with _one_at_a_time:
            outcome = build.runtime().cuda_shim_free(self.address)
        if outcome and check:
            raise KernelFault("freed twice" if outcome == 1 else "written just outside an allocation")


def host_view(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array over raw memory; the caller answers for its lifetime."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = (ctypes.c_ubyte * nbytes).from_address(address)
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def owned(address: int, nbytes: int) -> bool:
    """Whether the bytes lie within one live allocation."""
    with _one_at_a_time:
        return bool(build.runtime().cuda_shim_owns(address, nbytes))


def describe(address: int) -> str:
    """An address in words: which byte of an allocation of which size it is."""
    text = ctypes.create_string_buffer(512)
    build.runtime().cuda_shim_describe(address, text, len(text))
    return text.value.decode()


def compile_program(source: str | Path, options: Sequence[str] = ()) -> Program:
    """Compiles a `.cu` file (its folder is searched for includes) or text.

    `options` are NVRTC's: `-I…`, `-D…` and `-std=c++17` are followed, anything else is refused.

    Raises:
        UnreadableSource: see read_signatures.
        CompilationFailed: with the compiler's messages.
    """
    options = list(options)
    if isinstance(source, Path):
        options.append(f"-I{source.parent}")
        source = f'#line 1 "{source.name}"\n{source.read_text()}'
    refused = [option for option in options if not re.match(r"-I|-D|-std=c\+\+(11|14|17)$", option)]
    if refused:
        raise build.CompilationFailed(f"options that this shim does not know: {refused}")
    options = [option for option in options if not option.startswith("-std=")]
    if not source.startswith("#line"):
        source = f'#line 1 "kernel.cu"\n{source}'
    signatures = read_signatures(source)
    path = build.kernel_library(source, options, signatures.values())
    build.runtime()
    library = ctypes.CDLL(str(path))
    kernels = {}
    for name, signature in signatures.items():
        entry = ctypes.cast(getattr(library, f"cuda_shim_call_{name}"), ctypes.c_void_p).value
        assert entry is not None
        bounds = ctypes.c_int.in_dll(library, f"cuda_shim_bounds_{name}").value
        kernels[name] = Kernel(signature, entry, bounds)
    return Program(kernels, library)


def _unlike(given: np.dtype[Any], expected: np.dtype[Any]) -> bool:
    return given.itemsize != expected.itemsize or (given.kind == "f") != (expected.kind == "f")


def _three(sizes: Dimensions) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1, 1)[:3]
    return x, y, z


def _with_line(message: str) -> str:
    found = re.search(r" \[(.+)\+(0x[0-9a-f]+)\]$", message)
    if found is None:
        return message
    line = build.source_line(found[1], found[2])
    return message[: found.start()] + (f", {line}" if line else "")
