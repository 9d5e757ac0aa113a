"""Software prefetch for numba loops: asks for a cache line that a later iteration will read.

Rows of the item tables are far apart and in no order, so each first touch of one waits for memory.
Asking some rows ahead overlaps those waits (docs/adr/0006-item-tables-in-memory.md has the measurement).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = ["prefetch"]

_READ, _KEEP_IN_ALL_CACHES, _DATA = 0, 3, 1


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing_context: Any, array: Any, row: Any, column: Any) -> Any:
    """Hint that ``array[row, column]`` (a 2-D array) will be read soon; changes nothing else."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type = signature.args[0]
        value = context.make_array(array_type)(context, builder, arguments[0])
        pointer = cgutils.get_item_pointer(
            context, builder, array_type, value, list(arguments[1:]), wraparound=False
        )
        address = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        hint = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [address.type, number, number, number]),
            "llvm.prefetch.p0i8",
        )
        builder.call(hint, [address, number(_READ), number(_KEEP_IN_ALL_CACHES), number(_DATA)])
        return context.get_dummy_value()

    return types.void(array, row, column), codegen
