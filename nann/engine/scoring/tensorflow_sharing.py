"""Compiled programs that versions of one architecture share, each called with its own weights.

Without it every version that is swapped in is compiled anew: TensorFlow names each traced function
afresh, XLA's caches (in memory and on disk) go by that name, and what was compiled is never freed. A
second version of Brunch took 10 s of two cores and left 85 MB behind each time; with it, 0.3 s.
"""

from __future__ import annotations

import re
from collections import deque
from itertools import chain
from typing import Any, Final

from google.protobuf import text_format

__all__ = ["Program", "program_of"]

# What TensorFlow calls a traced function (its own name between a prefix and a number), and the place of a
# captured weight (a number), where it stands for itself and where a node reads it.
_NAME: Final = re.compile(r'"(?P<function>__[^"]*)_\d+"|"(?P<weight>\d+)(?P<output>(:\w+)*)"')


class Program:
    """A function as one version traced it, for all versions that trace the same.

    It refers to the weights of the version it came from, which are therefore emptied when that goes.
    """

    def __init__(self, traced: Any) -> None:
        self._traced = traced

    def call(self, weights: list[Any], *arguments: Any) -> Any:
        """Run it with the weights that another version's function captured (its ``captured_inputs``)."""
        return self._traced._call_flat(list(arguments), weights)


# By the text of the function, the one used last at the end. A version has three programs, and a new size of
# its tables makes one of them new; TensorFlow keeps what it compiled, so only the graphs are dropped here.
_PROGRAMS: Final[dict[str, Program]] = {}
_MOST_PROGRAMS: Final = 32


def program_of(own: Any) -> Program:
    """The program of a concrete function: that of an earlier version, or else its own."""
    text = _text(own)
    program = _PROGRAMS.pop(text, None) or Program(own)
    _PROGRAMS[text] = program
    while len(_PROGRAMS) > _MOST_PROGRAMS:
        del _PROGRAMS[next(iter(_PROGRAMS))]
    return program


def _text(function: Any) -> str:
    """All that decides what a function computes but its weights, and equal for equal ones.

    That is its graph and those of the functions it calls, with names in order of mention in place of
    TensorFlow's, which no two traces share, and the kinds of its weights.
    """
    graph = function.graph.as_graph_def()
    bodies = {definition.signature.name: definition for definition in graph.library.function}
    graph.ClearField("library")
    weights = {node.name for node in graph.node if node.name.isdigit()}
    names: dict[str, int] = {}
    pending = deque([graph])
    texts = []

    def renamed(match: re.Match[str]) -> str:
        name = match["weight"] or match[0].strip('"')
        if match["weight"] and name not in weights:
            return match[0]
        if name not in names:
            names[name] = len(names)
            if name in bodies:
                pending.append(bodies[name])
        return f'"{match["function"] or "weight"} {names[name]}{match["output"] or ""}"'

    while pending:
        body = pending.popleft()
        _drop_labels(body)
        texts.append(_NAME.sub(renamed, text_format.MessageToString(body)))
    texts.append(repr([_kind(tensor) for tensor in function.captured_inputs]))
    return "\n".join(texts)


def _drop_labels(body: Any) -> None:
    """Take out what only says what an argument was called: for a weight, a number."""
    described = (
        getattr(body, "node", ()),
        getattr(body, "node_def", ()),
        getattr(body, "arg_attr", {}).values(),
    )
    for one in chain.from_iterable(described):
        one.attr.pop("_user_specified_name", None)


def _kind(weight: Any) -> tuple[Any, ...]:
    """Dtype and shape of a tensor, or of what a variable holds."""
    held = getattr(getattr(weight, "_handle_data", None), "shape_and_type", ())
    return tuple((one.dtype, tuple(dim.size for dim in one.shape.dim)) for one in held) or (
        weight.dtype.name,
        tuple(weight.shape),
    )
