"""Every use of JAX's internals: a PJRT client, its compiler and its buffers, for `PJRT_JAX_VERSION` alone.

JAX's public interface runs functions that JAX traced. Programs that come from elsewhere, per-program
compiler options, a client of one's own and a call without tracing are below it, in modules that promise
nothing from one release to the next. So the version is pinned, checked, and all of it lies in this file.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

import numpy as np

from nann.engine.errors import BackendError, Unsupported

if TYPE_CHECKING:
    import jax

__all__ = [
    "PJRT_JAX_VERSION",
    "CompilerOptions",
    "ModuleSource",
    "PjrtDevice",
    "Program",
    "lower",
    "stablehlo_of",
    "with_half_products",
]

PJRT_JAX_VERSION = "0.10.2"
CompilerOptions = Mapping[str, str | bool | int | float]
_ENVIRONMENT = threading.Lock()
_FIRST_USE = threading.Lock()
_CPU_CLIENTS: dict[int | None, Any] = {}


def _jaxlib() -> Any:
    """The compiled half of JAX, of the pinned version.

    Raises:
        Unsupported: JAX is not installed, or another version is.
    """
    try:
        import jax
        import jaxlib
    except ImportError as error:
        raise Unsupported(
            "running a version's exported programs needs JAX, which is not installed: "
            "pip install 'nann[pjrt]' (or 'nann[gpu]'), on Python 3.11 or newer"
        ) from error
    found = {jax.__version__, jaxlib.__version__}
    if found != {PJRT_JAX_VERSION}:
        raise Unsupported(
            f"running a version's exported programs needs jax and jaxlib {PJRT_JAX_VERSION}, found jax "
            f"{jax.__version__} and jaxlib {jaxlib.__version__}: pip install 'nann[pjrt]' (or 'nann[gpu]')"
        )
    from jax._src.lib import _jax

    return _jax


@dataclass(frozen=True, slots=True)
class ModuleSource:
    """A StableHLO module that is made when it has to be compiled; `identity` is all that decides it."""

    identity: bytes
    module: Callable[[], bytes]


class PjrtDevice:
    """One device of one PJRT client: compiles programs for it and puts arrays on it.

    Thread-safe. `jax_device` is what JAX's own functions take.
    """

    def __init__(
        self, jax_device: Any, *, platform: str, options: CompilerOptions, threads: int | None
    ) -> None:
        self._jaxlib = _jaxlib()
        self.jax_device = jax_device
        self.platform = platform  # as JAX names it when it lowers: a GPU's own attribute says "gpu"
        self.options = dict(options)
        self._threads = threads
        self._client = jax_device.client
        self._devices = self._jaxlib.DeviceList((jax_device,))
        # Compiling iterates over the list, and its iterator's type is registered when it is first asked for.
        # If the garbage collector runs in between, so do other threads, and one of them that compiles finds
        # half a type and crashes the process. So it is asked for here, one thread at a time.
        with _FIRST_USE:
            tuple(self._devices)

    @classmethod
    def cpu(cls, *, threads: int | None, options: CompilerOptions) -> PjrtDevice:
        """The processor, under a client of our own: `threads` for one operation (default: all).

        Programs run on the caller's thread, which joins the client's pool only when `threads` > 1.
        JAX's own CPU client, shared by the process, offers neither.
        """
        _jaxlib()
        device = _cpu_client(threads).devices()[0]
        return cls(device, platform="cpu", options=options, threads=threads)

    @classmethod
    def cuda(
        cls, index: int, *, options: CompilerOptions, memory_fraction: float | None = None
    ) -> PjrtDevice:
        """GPU number `index` under JAX's own client, which takes memory as it needs it.

        It takes at most `memory_fraction` of the whole. A process has one such client: what it was first
        made with stays.

        Raises:
            Unsupported: this JAX has no CUDA plugin, or the machine has no such GPU.
        """
        _jaxlib()
        import jax

        # JAX would take three quarters of the memory at once; the item tables and the graph live there too.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        if memory_fraction is not None and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
            os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(memory_fraction))
        try:
            devices = jax.local_devices(backend="cuda")
        except RuntimeError as error:
            raise Unsupported(f"JAX finds no CUDA device: {str(error).splitlines()[0]}") from error
        if index >= len(devices):
            raise Unsupported(f"there is no device cuda:{index}: JAX finds {len(devices)}")
        return cls(devices[index], platform="cuda", options=options, threads=None)

    def put(self, array: np.ndarray) -> jax.Array:
        """The array on the device; a copy, or the array itself when that is aligned host memory."""
        import jax

        with _errors():
            return jax.device_put(array, self.jax_device)

    def borrow(self, array: np.ndarray) -> jax.Array:
        """Host memory, which must start at a multiple of 64 bytes, as an array of a CPU device."""
        return self._jaxlib.dlpack_managed_tensor_to_buffer(array.__dlpack__(), self.jax_device, None)

    def compile(self, source: ModuleSource, cache_dir: Path | None = None) -> Program:
        """The program of a StableHLO module, from `cache_dir` where it has been compiled before.

        What is in `cache_dir` is machine code: it must be as trusted as the program itself. A program that
        this process runs already is the one that is returned: versions of one architecture share theirs.

        Raises:
            BackendError: the compiler refused the module.
        """
        key = self._cache_key(source.identity)
        running = _RUNNING.get((self.jax_device.id, key))
        if running is None:
            executable = self._executable(source, key, cache_dir)
            running = Program(executable, key, self._jaxlib.JaxRuntimeError)
            running = _RUNNING.setdefault((self.jax_device.id, key), running)
        return running

    def _executable(self, source: ModuleSource, key: str, cache_dir: Path | None) -> Any:
        settings = self._jaxlib.CompileOptions()
        settings.env_option_overrides = list(self.options.items())
        if cache_dir is None:
            return self._compile(source.module(), settings)
        path = cache_dir / f"{key}.pjrt"
        try:
            return self._client.deserialize_executable(path.read_bytes(), self._devices, settings)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, self._jaxlib.JaxRuntimeError):
            path.unlink(missing_ok=True)  # damaged: made anew below
        executable = self._compile(source.module(), settings)
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        temporary.write_bytes(executable.serialize())
        temporary.rename(path)
        return executable

    def _compile(self, module: bytes, settings: Any) -> Any:
        with _errors():
            return self._client.compile_and_load(module, self._devices, settings)

    def _cache_key(self, identity: bytes) -> str:
        """A hash of everything that the machine code depends on."""
        parts = [
            PJRT_JAX_VERSION,
            self._client.platform_version,
            self.jax_device.device_kind,
            str(sorted(self.options.items())),
            str(self._threads),
            os.environ.get("XLA_FLAGS", ""),
            _processor() if self.platform == "cpu" else "",
        ]
        return hashlib.sha256("\n".join(parts).encode() + b"\n" + identity).hexdigest()


def _cpu_client(threads: int | None) -> Any:
    """The process's only client of `threads`.

    JAX's caches hold on to each device that was ever put on, and so to its client, whose dozen threads
    every version would otherwise leave behind.
    """
    from jax._src.lib import xla_client

    with _ENVIRONMENT:
        if threads not in _CPU_CLIENTS:
            # The pool's size is read from NPROC while the client is made, and from nowhere else.
            with _environment("NPROC", None if threads is None else str(threads)):
                _CPU_CLIENTS[threads] = xla_client.make_cpu_client(asynchronous=False)
        return _CPU_CLIENTS[threads]


class Program:
    """A compiled program on its device. Thread-safe. Programs of one `key` are the same machine code."""

    __slots__ = ("__weakref__", "_error", "_execute", "key")

    def __init__(self, executable: Any, key: str, error: type[Exception]) -> None:
        self.key = key
        self._execute = executable.execute_sharded
        self._error = error

    def __call__(self, arguments: Sequence[jax.Array]) -> list[jax.Array]:
        """Run: on the CPU the program has run on return, on a GPU it is enqueued.

        Raises:
            BackendError: it failed, as far as that is known on return.
        """
        try:
            outputs = self._execute(arguments).disassemble_into_single_device_arrays()
        except self._error as error:
            raise BackendError(f"the model failed: {str(error).splitlines()[0]}") from error
        return [output[0] for output in outputs]


# By number of the device and key, as long as a version needs them.
_RUNNING: WeakValueDictionary[tuple[int, str], Program] = WeakValueDictionary()


def stablehlo_of(hlo: bytes) -> bytes:
    """A serialised HLO module (as TensorFlow exports it) as the MLIR bytecode that `compile` takes.

    JAX keeps the interpreter for the four milliseconds that it takes, and a model has some 50 programs: twice
    as long again belongs to the others, who would have to wait for all of them.

    Raises:
        BackendError: it is not one.
    """
    started_s = time.perf_counter()
    with _errors():
        module: bytes = _jaxlib().mlir.hlo_to_stablehlo(hlo)
    time.sleep(2 * (time.perf_counter() - started_s))
    return module


def lower(function: Any, platform: str, arguments: Sequence[tuple[tuple[int, ...], str]]) -> bytes:
    """MLIR bytecode of a JAX function of arrays of these (shape, dtype); no argument is left out."""
    import jax
    from jax._src.interpreters.mlir import module_to_bytecode

    specs = [jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for shape, dtype in arguments]
    lowered = jax.jit(function, keep_unused=True).trace(*specs).lower(lowering_platforms=(platform,))
    return module_to_bytecode(lowered.compiler_ir("stablehlo"))  # type: ignore[no-any-return]


def with_half_products(module: bytes, dtype: Literal["float16", "bfloat16"]) -> bytes:
    """The module with the operands of its float32 matrix products rounded to `dtype`; sums stay float32."""
    from jax._src.interpreters.mlir import make_ir_context, module_to_bytecode
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    with make_ir_context(), ir.Location.unknown():
        parsed = ir.Module.parse(module)
        half = ir.F16Type.get() if dtype == "float16" else ir.BF16Type.get()

        def rounded(value: Any) -> Any:
            kind = ir.RankedTensorType(value.type)
            return stablehlo.convert(ir.RankedTensorType.get(kind.shape, half), value)

        def visit(operation: Any) -> Any:
            if operation.name == "stablehlo.dot_general":
                left, right = operation.operands
                if all(str(ir.RankedTensorType(v.type).element_type) == "f32" for v in (left, right)):
                    with ir.InsertionPoint(operation):
                        operation.operands[0], operation.operands[1] = rounded(left), rounded(right)
            return ir.WalkResult.ADVANCE

        parsed.operation.walk(visit)
        return module_to_bytecode(parsed)  # type: ignore[no-any-return]


@contextmanager
def _errors() -> Iterator[None]:
    """Turns any error of XLA's inside the block into a `BackendError`."""
    from jax.errors import JaxRuntimeError

    try:
        yield
    except JaxRuntimeError as error:
        raise BackendError(f"the model failed: {str(error).splitlines()[0]}") from error


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


@cache
def _processor() -> str:
    """What decides which instructions the CPU compiler uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", maxsplit=1)[0].splitlines()
    except OSError:
        import platform

        return f"{platform.machine()} {platform.processor()}"
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(kept))
