"""The `.cu` files of `kernels/` as functions: how they are compiled."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nann.engine.cuda.errors import device_errors

__all__ = ["KERNELS", "BlockSizes", "Modules", "source"]

_FOLDER = Path(__file__).parent / "kernels"
# The file of each kernel.
KERNELS = {
    "seed": "expand.cu",
    "expand": "expand.cu",
    "estimate": "gate.cu",
    "choose": "choose.cu",
    "gather": "gather.cu",
    "merge": "merge.cu",
    "admit": "filters.cu",
    "inner_products": "scan.cu",
}

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Threads a block and the like, by kernel file; compiled in as ``-D<NAME>=<value>``.

    Chosen by arithmetic, not measured: a merge is one block a query and as fast as its barriers, so its
    block is no larger than the pairs of a usual sort (1,024 keys); 4,096 keys are the 32 KiB of shared
    memory that any device gives without asking; a block of `gather` copies about 10 KiB. A block of
    `estimate` takes seven nodes of 32 neighbours, a thread `gate_sums` (4 n) products side by side.
    """

    expand_block: int = 256
    gate_block: int = 256
    gate_sums: int = 8
    gather_block: int = 256
    gather_rows: int = 16
    merge_block: int = 512
    sort_piece: int = 4096
    filter_block: int = 256
    scan_tile: int = 64
    scan_depth: int = 16

    def options(self) -> tuple[str, ...]:
        """The compiler's options."""
        defines = (f"-D{field.name.upper()}={getattr(self, field.name)}" for field in fields(self))
        return ("-std=c++17", *defines)


@functools.cache
def source(file: str) -> str:
    """The text of a `.cu` file with its headers in place, each line still known by its own file.

    CuPy keeps compiled kernels by the text it is given: a header it had to look up would not count.
    """
    return _expanded(file, set())


def _expanded(file: str, seen: set[str]) -> str:
    seen.add(file)
    text = (_FOLDER / file).read_text(encoding="utf-8").replace("#pragma once", "")

    def insert(found: re.Match[str]) -> str:
        following = text.count("\n", 0, found.start()) + 2
        header = "" if found[1] in seen else _expanded(found[1], seen)
        return f'{header}\n#line {following} "{file}"'

    return f'#line 1 "{file}"\n{_INCLUDE.sub(insert, text)}'


class Modules:
    """The compiled kernels of one device, shared by its lanes. Nothing is compiled before `compile`."""

    def __init__(self, sizes: BlockSizes | None = None) -> None:
        self.sizes = sizes or BlockSizes()
        self._functions: dict[str, Any] = {}

    def compile(self) -> None:
        """Compile every kernel for the current device, or take it from CuPy's cache on disk.

        Raises:
            BackendError: a kernel does not compile; names file and line.
        """
        import cupy

        functions = {}
        for file in dict.fromkeys(KERNELS.values()):
            with device_errors(f"compiling {file}"):
                module = cupy.RawModule(code=source(file), options=self.sizes.options())
                for name in (name for name, its_file in KERNELS.items() if its_file == file):
                    functions[name] = module.get_function(name)
        self._functions = functions

    def __getitem__(self, kernel: str) -> Any:
        if not self._functions:
            self.compile()
        return self._functions[kernel]
