"""Every kernel compiles without a warning for every GPU we name, by NVIDIA's compiler, which needs no GPU."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import pytest

from nann.engine.cuda.modules import KERNELS, BlockSizes, source

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
FILES = sorted(set(KERNELS.values()))
FOLDER = Path(__file__).parents[4] / "nann/engine/cuda/kernels"
COMPILATION_ERROR = 6  # NVRTC_ERROR_COMPILATION


@functools.cache
def nvrtc() -> ctypes.CDLL | None:
    """The compiler of the `nvidia-cuda-nvrtc` wheel."""
    try:
        from nvidia import cuda_nvrtc
    except ImportError:
        return None
    found = sorted(Path(cuda_nvrtc.__path__[0]).glob("lib/libnvrtc.so*"))
    return ctypes.CDLL(str(found[0])) if found else None


def compile_to(
    what: str, text: str, name: str, options: tuple[str, ...] = BlockSizes().options()
) -> tuple[int, str, bytes]:
    """NVRTC's status, its log, and the machine code (``CUBIN``) or assembly (``PTX``)."""
    library = nvrtc()
    if library is None:
        pytest.skip("no wheel of nvidia-cuda-nvrtc-cu12 for this platform")
    program = ctypes.c_void_p()
    assert not library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = library.nvrtcCompileProgram(program, len(options), given)

    def fetch(size_of: str, get: str) -> bytes:
        size = ctypes.c_size_t()
        assert not getattr(library, size_of)(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        assert not getattr(library, get)(program, buffer)
        return buffer.raw

    log = fetch("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode()
    code = b"" if status else fetch(f"nvrtcGet{what}Size", f"nvrtcGet{what}")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return status, log, code


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_a_kernel_compiles_without_a_warning(file, architecture) -> None:
    options = (*BlockSizes().options(), f"--gpu-architecture={architecture}")
    status, log, cubin = compile_to("CUBIN", source(file), file, options)
    assert (status, log) == (0, "")
    for kernel in (kernel for kernel, its_file in KERNELS.items() if its_file == file):
        assert f".text.{kernel}".encode() in cubin


def test_an_estimate_is_rounded_after_every_product() -> None:
    """Which the shim cannot tell: the compiler may fuse what is not said to be rounded."""
    fused = "fma.rn.f32"
    _, _, assembly = compile_to("PTX", source("gate.cu"), "gate.cu")
    assert fused not in assembly.decode()
    plain = source("gate.cu").replace("__fadd_rn(sum, __fmul_rn(a, b))", "sum + a * b")
    assert fused in compile_to("PTX", plain, "gate.cu")[2].decode()


def test_every_file_with_a_kernel_is_compiled() -> None:
    kernels = {
        name: path.name
        for path in FOLDER.iterdir()
        for name in re.findall(r"__global__[^;{]*?\b(\w+)\(const", path.read_text(encoding="utf-8"))
    }
    assert kernels == KERNELS


@pytest.mark.parametrize(
    ("file", "line_of"),
    [("common.cuh", "bool is_finite("), ("sort.cuh", "void sort_piece("), ("merge.cu", "int collect(")],
)
def test_a_message_of_the_compiler_names_our_file_and_line(file, line_of) -> None:
    text = (FOLDER / file).read_text(encoding="utf-8")
    line = next(i for i, words in enumerate(text.split("\n"), 1) if line_of in words)
    broken = source("merge.cu").replace(line_of, f"nonsense {line_of}", 1)
    status, log, _ = compile_to("CUBIN", broken, "merge.cu")
    assert status == COMPILATION_ERROR
    assert log.startswith(f"{file}({line}): error")
