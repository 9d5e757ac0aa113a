"""What a launcher must know of a `.cu` text: its kernels' names, parameters and launch bounds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_BOUNDS = r"(?:__launch_bounds__\s*\((?P<bounds{}>(?:[^()]|\([^()]*\))*)\)\s*)?"
_KERNEL = re.compile(
    rf'extern\s*"C"\s*__global__\s+{_BOUNDS.format("_before")}void\s+{_BOUNDS.format("_after")}'
    r"(?P<name>\w+)\s*\((?P<parameters>[^)]*)\)\s*\{"
)
_SCALARS: dict[str, np.dtype[Any]] = {
    "int": np.dtype(np.int32),
    "unsigned": np.dtype(np.uint32),
    "unsigned int": np.dtype(np.uint32),
    "long long": np.dtype(np.int64),
    "unsigned long long": np.dtype(np.uint64),
    "float": np.dtype(np.float32),
}
# What a pointer may point to: element type (None for bytes and vectors: any array will do), alignment.
_POINTEES: dict[str, tuple[np.dtype[Any] | None, int]] = {
    "short": (np.dtype(np.int16), 2),
    "unsigned short": (np.dtype(np.uint16), 2),
    **dict.fromkeys(("char", "signed char", "unsigned char", "void"), (None, 1)),
    "uchar4": (None, 4),
    **dict.fromkeys(("int2", "uint2", "float2"), (None, 8)),
    **dict.fromkeys(("int4", "uint4", "float4", "longlong2", "ulonglong2"), (None, 16)),
}
for _name, _dtype in _SCALARS.items():
    _POINTEES[_name] = (_dtype, _dtype.itemsize)


class UnreadableSource(ValueError):
    """A kernel of the file is not written in the one form that our kernels use."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a kernel.

    `dtype` is the scalar's type, or what a pointer points to (None: raw bytes or a vector type, any array
    will do); `alignment` is the multiple, in bytes, that a pointer has to be of; `written` is whether a
    pointer is not to const.
    """

    name: str
    c_type: str
    pointer: bool
    written: bool
    dtype: np.dtype[Any] | None
    alignment: int


@dataclass(frozen=True, slots=True)
class Signature:
    """A kernel: its name, its parameters in order, and its `__launch_bounds__` expression if it has one."""

    name: str
    parameters: tuple[Parameter, ...]
    launch_bounds: str | None


def read_signatures(text: str) -> dict[str, Signature]:
    """The kernels of a `.cu` text by name.

    Raises:
        UnreadableSource: a `__global__` function is not `extern "C" __global__ void name(parameters) {`, or a
            parameter is of a type that our kernels do not take.
    """
    code = _COMMENT.sub(lambda found: " " * len(found[0]), text)
    kernels = {}
    for found in _KERNEL.finditer(code):
        parameters = tuple(_parameter(found["name"], words) for words in _split(found["parameters"]))
        bounds = found["bounds_before"] or found["bounds_after"]
        kernels[found["name"]] = Signature(
            found["name"], parameters, bounds.split(",")[0] if bounds else None
        )
    n_global = len(re.findall(r"\b__global__\b", code))
    if n_global != len(kernels):
        raise UnreadableSource(
            f"{n_global} functions are __global__, {len(kernels)} have the form "
            f'extern "C" __global__ void name(parameters) {{: {sorted(kernels)}'
        )
    return kernels


def _split(parameters: str) -> list[str]:
    return parameters.split(",") if parameters.strip() else []


def _parameter(kernel: str, words: str) -> Parameter:
    found = re.fullmatch(r"\s*(?P<type>.*?)(?P<name>\w+)\s*", words, re.DOTALL)
    if found is None:
        raise UnreadableSource(f"{kernel}: cannot read the parameter {words.strip()!r}")
    c_type = " ".join(found["type"].replace("__restrict__", " ").split())
    bare = " ".join(re.sub(r"\b(const|volatile)\b", " ", c_type).split())
    if bare.count("*") == 1 and bare.endswith("*"):
        pointee = bare[:-1].strip()
        if pointee in _POINTEES:
            dtype, alignment = _POINTEES[pointee]
            written = not re.search(r"\bconst\b", c_type.split("*")[0])
            return Parameter(found["name"], c_type, True, written, dtype, alignment)
    elif bare in _SCALARS:
        return Parameter(found["name"], c_type, False, False, _SCALARS[bare], _SCALARS[bare].itemsize)
    raise UnreadableSource(
        f"{kernel}: the parameter {words.strip()!r} is of a type that kernels here do not take"
    )
