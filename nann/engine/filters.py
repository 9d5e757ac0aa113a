"""Attribute predicates: which items a query's ``filter`` admits.

A filter is a mapping from an attribute (a column of ``items.parquet``) to a condition; an item is
admitted when it meets all of them. A condition is a value (equality), a list (one of), or a mapping
of operators, all of which must hold:

    {"category": 12, "year": {"gte": 1990, "lt": 2000}, "genres": {"contains": "Comedy"}}

Operators: eq ne in nin gt gte lt lte contains (a list column holds the value). An item whose
attribute is null meets only ``ne`` and ``nin``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from nann.engine.errors import InvalidQuery

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from jaxtyping import Bool

__all__ = ["MAX_VALUES", "FilterCache"]

MAX_VALUES = 1000
_CACHED = 64
_ORDERED = {"gt": "gt", "gte": "ge", "lt": "lt", "lte": "le"}


class FilterCache:
    """Masks of recently used filters over one table; safe from several threads."""

    def __init__(self, table: pl.DataFrame | None) -> None:
        self._table = table
        self._masks: OrderedDict[str, Bool[np.ndarray, " N"]] = OrderedDict()
        self._lock = Lock()

    def mask(self, predicate: Mapping[str, Any]) -> Bool[np.ndarray, " N"]:
        """Which items ``predicate`` admits.

        Raises:
            InvalidQuery: an unknown attribute or operator, or a value of the wrong type.
        """
        import orjson

        try:
            key = orjson.dumps(predicate, option=orjson.OPT_SORT_KEYS).decode()
        except TypeError as error:
            raise InvalidQuery(f"filter: {error}") from error
        with self._lock:
            if key in self._masks:
                self._masks.move_to_end(key)
                return self._masks[key]
        mask = self._evaluate(predicate)
        with self._lock:
            self._masks[key] = mask
            while len(self._masks) > _CACHED:
                self._masks.popitem(last=False)
        return mask

    def _evaluate(self, predicate: Mapping[str, Any]) -> Bool[np.ndarray, " N"]:
        import polars as pl

        if self._table is None:
            raise InvalidQuery("filter: this model has no item attributes")
        members: list[tuple[str, str, Any]] = []
        for name, condition in predicate.items():
            if name not in self._table.columns:
                known = ", ".join(self._table.columns) or "none"
                raise InvalidQuery(f"filter: unknown attribute {name!r}; known: {known}")
            operators = condition if isinstance(condition, Mapping) else _shorthand(condition)
            if not operators:
                raise InvalidQuery(f"filter: {name!r} has no operator")
            members += [(name, operator, value) for operator, value in operators.items()]
        if not members:
            raise InvalidQuery("filter: no condition given")
        try:
            # Polars checks some values as an expression is built (TypeError), others as it runs.
            conditions = [_condition(pl.col(name), name, op, value) for name, op, value in members]
            admitted = self._table.select(pl.all_horizontal(conditions).alias("admitted"))["admitted"]
        except (pl.exceptions.PolarsError, TypeError, OverflowError) as error:
            raise InvalidQuery(
                f"filter: a value does not fit its attribute ({_first_line(error)})"
            ) from error
        return admitted.fill_null(False).to_numpy().copy()


def _shorthand(condition: Any) -> Mapping[str, Any]:
    return {"in": condition} if isinstance(condition, list | tuple) else {"eq": condition}


def _condition(column: pl.Expr, name: str, operator: str, value: Any) -> pl.Expr:
    if operator in ("in", "nin"):
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) > MAX_VALUES:
            raise InvalidQuery(f"filter: {name}.{operator} takes a list of at most {MAX_VALUES} values")
        member: pl.Expr = column.is_in([_scalar(name, v) for v in value])
        return member if operator == "in" else (~member).fill_null(True)
    scalar = _scalar(name, value)
    if operator == "eq":
        return column.eq(scalar)
    if operator == "ne":
        return column.ne(scalar).fill_null(True)
    if operator == "contains":
        return column.list.contains(scalar)
    if operator in _ORDERED:
        return getattr(column, _ORDERED[operator])(scalar)  # type: ignore[no-any-return]
    raise InvalidQuery(f"filter: unknown operator {operator!r} on {name!r}")


def _scalar(name: str, value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise InvalidQuery(f"filter: {name!r} takes numbers, strings or booleans, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):  # JSON, the cache's key, has no such number
        raise InvalidQuery(f"filter: {name!r} takes finite numbers, not {value}")
    return value


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
