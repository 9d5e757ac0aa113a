"""Compiles the shim's runtime and `.cu` texts with g++, once per content."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from outside_programs import outside_program

from cuda_shim.source import Signature

_HERE = Path(__file__).parent
_RUNTIME = ("scheduler.cpp", "access.cpp", "memory.cpp")
_RUNTIME_PARTS = (*_RUNTIME, "shim.h", "fiber.h", "faults.h", "memory.h", "scheduler.h")
_FLAGS = ("-std=c++17", "-fPIC", "-g1", "-fno-exceptions", "-fno-rtti")
# Reinterpreting casts between arrays of equal bytes are common in device code; misaligned ones fault on a
# GPU, so they trap here, as do overflows and shifts past the width.
_KERNEL_FLAGS = (
    "-O1",
    "-fno-strict-aliasing",
    "-fstack-clash-protection",  # a large frame touches every page, so it cannot step over the closed one
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unused-function",
    "-fsanitize=alignment,shift,signed-integer-overflow,integer-divide-by-zero,bounds",
    "-fsanitize-undefined-trap-on-error",
    "-fsanitize=thread",  # a call of ours, not of libtsan, before every load and store: see access.cpp
)


class CompilationFailed(RuntimeError):
    """The compiler refused the text; the message is the compiler's own."""


def cache_directory() -> Path:
    """Where compiled objects are kept: one directory per user below the system's temporary one."""
    directory = Path(tempfile.gettempdir()) / f"nann-cuda-shim-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


@functools.cache
def runtime() -> ctypes.CDLL:
    """The scheduler and the guarded memory, compiled at first use and visible to every kernel library."""
    key = _digest([*((_HERE / name).read_bytes() for name in _RUNTIME_PARTS), _compiler()])
    library = cache_directory() / f"runtime-{key}.so"
    if not library.exists():
        sources = [str(_HERE / name) for name in _RUNTIME]
        _compile([*_FLAGS, "-O2", "-shared", *sources], library)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.cuda_shim_alloc.restype = ctypes.c_void_p
    loaded.cuda_shim_alloc.argtypes = [ctypes.c_size_t, ctypes.c_int]
    loaded.cuda_shim_free.argtypes = [ctypes.c_void_p]
    loaded.cuda_shim_check.restype = ctypes.c_void_p
    loaded.cuda_shim_owns.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loaded.cuda_shim_describe.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    u32x3 = ctypes.c_uint32 * 3
    loaded.cuda_shim_launch.argtypes = [
        ctypes.c_void_p,  # the trampoline
        ctypes.c_char_p,  # the kernel's name
        u32x3,  # grid
        u32x3,  # block
        ctypes.c_uint64,  # dynamic shared memory, bytes
        ctypes.c_void_p,  # arguments: an array of addresses
        ctypes.c_uint64,  # seed
        ctypes.c_uint32,  # most blocks alive at once
        ctypes.c_double,  # limit, seconds of processor time
        ctypes.c_char_p,
        ctypes.c_uint64,
    ]
    return loaded


def kernel_library(text: str, options: Sequence[str], signatures: Iterable[Signature]) -> Path:
    """The shared library of a `.cu` text, with one `cuda_shim_call_NAME(void** arguments)` for each kernel.

    Raises:
        CompilationFailed: with the compiler's messages.
    """
    trampolines = "".join(_trampoline(signature) for signature in signatures)
    unit = f'{text}\n#line 1 "trampolines"\n{trampolines}'
    headers = _headers(text, [Path(option[2:]) for option in options if option.startswith("-I")])
    shim = _HERE / "shim.h"
    key = _digest(
        [unit, *options, *_KERNEL_FLAGS, shim.read_bytes(), *(p.read_bytes() for p in headers), _compiler()]
    )
    library = cache_directory() / f"kernels-{key}.so"
    if not library.exists():
        flags = [*_FLAGS, *_KERNEL_FLAGS, *options, "-include", str(shim), "-x", "c++", "-"]
        _compile(flags, library, unit)
    return library


def source_line(library: str, offset: str) -> str | None:
    """`file.cu:12` of an instruction, from the library's line table; None when it has none."""
    answer = subprocess.run(["addr2line", "-e", library, offset], capture_output=True, text=True, check=False)
    line = answer.stdout.strip().split(" ")[0].rsplit("/", 1)[-1]
    return line if answer.returncode == 0 and line and "?" not in line else None


def _trampoline(signature: Signature) -> str:
    name = signature.name
    unchecked = "__attribute__((no_sanitize_thread))"  # it reads the arguments, which are the host's
    arguments = ", ".join(f"*({p.c_type}*)a[{i}]" for i, p in enumerate(signature.parameters))
    bounds = signature.launch_bounds or "1024"
    return (
        f'extern "C" {unchecked} void cuda_shim_call_{name}(void** a) {{ (void)a; {name}({arguments}); }}\n'
        f'extern "C" {{ int cuda_shim_bounds_{name} = ({bounds}); }}\n'
    )


def _headers(text: str, folders: Sequence[Path]) -> list[Path]:
    """The quoted includes of a text, and theirs, along -I (one not found is left to the compiler)."""
    found: list[Path] = []
    texts = [text]
    while texts:
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', texts.pop(), re.MULTILINE):
            path = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if path is not None and path not in found:
                found.append(path)
                texts.append(path.read_text())
    return found


def _compile(arguments: Sequence[str], library: Path, text: str | None = None) -> None:
    # Workers may compile the same text at once: each writes its own file, and the last rename wins.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        if text is None:
            _run([*arguments, "-o", str(built)])
        else:  # two steps, as the linker would add the sanitizer's own library
            unit = str(built.with_suffix(".o"))
            _run([*arguments, "-c", "-o", unit], text)
            _run(["-shared", unit, "-o", str(built)])
        built.replace(library)


def _run(arguments: Sequence[str], text: str | None = None) -> None:
    outcome = subprocess.run([_COMPILER, *arguments], input=text, capture_output=True, text=True, check=False)
    if outcome.returncode:
        raise CompilationFailed(outcome.stderr)


_COMPILER = os.environ.get("CXX", "g++")


@functools.cache
def _compiler() -> str:
    compiler = outside_program(_COMPILER, install="apt install g++, or set CXX to GCC's")
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]
