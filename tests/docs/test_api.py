"""docs/api.md: its fields, paths, methods, operators and note codes are those of the code, both ways."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import polars as pl
import pytest
from documents import DOCS, ROOT, inline_code, plain, section, table
from starlette.routing import Route

from nann.engine import filters
from nann.engine.errors import InvalidQuery
from nann.engine.types import Note
from nann.service.health import Health, HealthState
from nann.service.http_api.app import create_app
from nann.service.http_api.docs import RetrieveReplyBody
from nann.service.metrics import Metrics
from nann.service.params import _FIELDS as FIELDS_OF_POLICY
from nann.service.pb import retrieval_pb2 as pb
from nann.service.settings import Settings
from nann.service.wire.rest_json import EventsBody, ParamsBody, RetrieveBody
from nann.service.wire.tf_predict import INPUTS, SIGNATURES

TEXT = (DOCS / "api.md").read_text(encoding="utf-8")


def _names(rows: list[dict[str, str]], column: str) -> set[str]:
    return {name for row in rows for name in plain(row[column]).split(", ")}


def test_every_field_of_a_request_is_in_the_table() -> None:
    rows = table(TEXT, "field", "type", "when left out", "meaning")
    assert _names(rows, "field") == set(RetrieveBody.model_fields)


def test_every_search_parameter_is_in_the_table_under_its_policy() -> None:
    rows = table(TEXT, "field", "type", "policy", "meaning")
    assert _names(rows, "field") == set(ParamsBody.model_fields)
    written = {
        (policy, plain(row["field"])) for row in rows for policy in plain(row["policy"]).split(", ") if policy
    }
    # What only profiles set (level_ef) is no field of a request.
    in_requests = ParamsBody.model_fields
    assert written == {
        (policy, name) for policy, names in FIELDS_OF_POLICY.items() for name in names if name in in_requests
    }
    assert {code for code in inline_code(section(TEXT, "Policies")) if code in FIELDS_OF_POLICY} == set(
        FIELDS_OF_POLICY
    )


def test_every_field_of_a_reply_is_in_the_table() -> None:
    assert _names(table(TEXT, "field", "meaning"), "field") == set(RetrieveReplyBody.model_fields)


def test_every_field_of_events_is_in_the_table() -> None:
    rows = table(TEXT, "field of the events' body", "meaning")
    assert _names(rows, "field of the events' body") == set(EventsBody.model_fields)


def test_every_path_is_in_the_table(tmp_path: Path) -> None:
    app = create_app(cast("Any", None), Settings(repository=tmp_path), Health(), Metrics())
    served = {
        f"{method.upper()} {path}"
        for path, methods in app.openapi()["paths"].items()
        for method in methods
        if method not in ("head", "parameters")
    }
    served |= {f"GET {route.path}" for route in app.routes if isinstance(route, Route)}
    assert len(served) > 8
    assert _names(table(TEXT, "path", "what it does"), "path") == served


def test_every_method_over_grpc_is_in_the_table() -> None:
    methods = pb.DESCRIPTOR.services_by_name["RetrievalService"].methods_by_name
    assert _names(table(TEXT, "method", "REST"), "method") == set(methods)


def test_every_operator_of_a_filter_is_in_the_table() -> None:
    documented = _names(table(TEXT, "operator", "an item is admitted when its attribute"), "operator")
    listed = re.search(r"^Operators: ([a-z ]+) \(", filters.__doc__ or "", re.M)
    assert listed is not None
    assert documented == set(listed[1].replace("contains", "contains ").split())
    cache = filters.FilterCache(pl.DataFrame({"a": [1, None], "tags": [["x"], None]}))
    for operator in documented:
        attribute, value = ("tags", "x") if operator == "contains" else ("a", 1)
        condition = {operator: [value] if operator in ("in", "nin") else value}
        assert cache.mask({attribute: condition})[1] == (operator in ("ne", "nin")), operator
    with pytest.raises(InvalidQuery, match="unknown operator"):
        cache.mask({"a": {"like": 1}})


def test_the_length_of_a_list_of_values_is_right() -> None:
    assert f"at most {filters.MAX_VALUES:,} values" in TEXT


def test_every_note_is_in_the_table() -> None:
    codes = {code for path in (ROOT / "nann").rglob("*.py") for code in _note_codes(path)}
    assert {"unknown_history_items", "seen_unknown", "popular_fallback"} <= codes
    assert _names(table(TEXT, "code", "meaning", "count"), "code") == codes


def _note_codes(path: Path) -> Iterator[str]:
    """The first argument of every call of `Note`; where it is made of a name, that of each caller."""
    source = path.read_text(encoding="utf-8")
    if f"{Note.__name__}(" not in source:
        return
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    for call in calls:
        if ast.unparse(call.func) != Note.__name__ or not call.args:
            continue
        code = call.args[0]
        if isinstance(code, ast.Constant):
            yield str(code.value)
        elif isinstance(code, ast.JoinedStr):
            for user in calls:
                # A caller that throws its notes away gives an empty list.
                if ast.unparse(user.func) == "self._known" and ast.unparse(user.args[3]) != "[]":
                    yield ast.unparse(code)[2:-1].replace("{name}", ast.literal_eval(user.args[1]))
    assert not any(isinstance(call.func, ast.Attribute) and call.func.attr == "Note" for call in calls)


def test_every_state_of_readyz_is_explained() -> None:
    assert {state.value for state in HealthState} <= set(inline_code(section(TEXT, "Health")))


def test_the_served_signatures_are_in_the_tables() -> None:
    rows = table(TEXT, "signature", "inputs", "outputs")
    assert {plain(row["signature"]): plain(row["outputs"]).split(", ") for row in rows} == {
        name: list(outputs) for name, outputs in SIGNATURES.items()
    }
    assert {tuple(plain(row["inputs"]).split(", ")) for row in rows} == {tuple(INPUTS)}
    tensors = {plain(row["tensor"]): row for row in table(TEXT, "tensor", "dtype and shape", "meaning")}
    assert set(tensors) == {*INPUTS, *(name for outputs in SIGNATURES.values() for name in outputs)}
    for name, dtypes in INPUTS.items():
        assert tensors[name]["dtype and shape"].startswith(" or ".join(dtypes))


@pytest.mark.parametrize(
    ("written", "setting"),
    [("200 when left out", None), ("10,000", "default_timeout_ms"), ("up to 64", "max_queries_per_call")],
)
def test_defaults_in_the_text(written: str, setting: str | None) -> None:
    from nann.service.params import DEFAULT_K

    value = DEFAULT_K if setting is None else Settings.model_fields[setting].default
    assert written in TEXT
    assert re.search(r"[\d,]+", written)[0].replace(",", "") == f"{value:.0f}"  # type: ignore[index]
