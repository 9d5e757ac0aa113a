"""docs/client.md: its tables are those of the client package, and its programs run in test_examples."""

from __future__ import annotations

import inspect
from dataclasses import fields

import nann_client
import pytest
from documents import DOCS, plain, table
from nann_client.client import AsyncClient, Client

TEXT = (DOCS / "client.md").read_text(encoding="utf-8")


def test_every_method_is_in_the_table_with_its_parameters() -> None:
    rows = {plain(row["method"]) for row in table(TEXT, "method", "what it does")}
    methods = {}
    for name, method in vars(Client).items():
        if name[0] != "_":
            parameters = inspect.signature(method).parameters.values()
            shown = [
                p.name if p.default is p.empty else f"{p.name}={p.default}"
                for p in parameters
                if p.name != "self"
            ]
            methods[name] = f"{name}({', '.join(shown)})"
    assert rows == set(methods.values())


@pytest.mark.parametrize("cls", [Client, AsyncClient])
def test_every_option_is_in_the_table_with_its_default(cls: type) -> None:
    rows = {
        plain(row["option"]): plain(row["default"]) for row in table(TEXT, "option", "default", "meaning")
    }
    options = {n: p for n, p in inspect.signature(cls).parameters.items() if n != "url"}
    assert set(rows) == set(options)
    assert rows["timeout_s"] == str(options["timeout_s"].default)
    assert options["retry"].default == nann_client.RetryPolicy()


def test_every_field_of_the_policy_is_in_the_table_with_its_default() -> None:
    rows = table(TEXT, "field of `RetryPolicy`", "default", "meaning")
    assert {plain(row["field of `RetryPolicy`"]): plain(row["default"]) for row in rows} == {
        field.name: str(field.default) for field in fields(nann_client.RetryPolicy)
    }


def test_every_error_is_in_the_table_under_its_base() -> None:
    rows = table(TEXT, "class", "a kind of", "when")
    assert {plain(row["class"]): plain(row["a kind of"]) for row in rows} == {
        name: value.__bases__[0].__name__
        for name, value in vars(nann_client).items()
        if isinstance(value, type)
        and issubclass(value, nann_client.NannError)
        and value is not nann_client.NannError
    }
