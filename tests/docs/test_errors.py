"""docs/errors.md is the error table, row by row."""

from __future__ import annotations

import re

import pytest
from documents import DOCS, inline_code, plain, table

from nann.engine.errors import RetrievalError
from nann.service.errors import ERROR_TABLE
from nann.service.http_api.app import _HTTP_CODES
from nann.service.http_api.call import _HTTP_ROWS
from nann.service.http_api.connection import REFUSALS

TEXT = (DOCS / "errors.md").read_text(encoding="utf-8")
ROWS = {
    plain(row["class"]): row
    for row in table(TEXT, "class", "code", "HTTP", "gRPC", "TF Serving", "what the caller should do")
}
HTTP_ROWS = {plain(row["code"]): row for row in table(TEXT, "code", "HTTP", "when")}


def test_every_class_has_a_row_and_every_row_a_class() -> None:
    assert set(ROWS) == {cls.__name__ for cls in ERROR_TABLE}


@pytest.mark.parametrize("error_class", ERROR_TABLE, ids=lambda cls: cls.__name__)
def test_a_row_has_the_statuses_of_the_class(error_class: type[RetrievalError]) -> None:
    written, row = ROWS[error_class.__name__], ERROR_TABLE[error_class]
    assert plain(written["code"]) == row.code
    assert written["HTTP"] == str(row.http_status)
    assert written["gRPC"] == row.grpc_code
    assert written["TF Serving"] == f"{row.tf_http_status}, {row.tf_grpc_code}"
    assert written["what the caller should do"]


def test_failures_of_http_itself() -> None:
    statuses = {row.code: str(row.http_status) for row in _HTTP_ROWS.values()}
    statuses |= {code: str(status) for status, code in _HTTP_CODES.items()}
    statuses |= {code: str(status) for code, status in REFUSALS.items()}
    assert {code: row["HTTP"] for code, row in HTTP_ROWS.items()} == {**statuses, "http_error": "any"}


def test_the_text_names_codes_that_exist() -> None:
    known = {row.code for row in ERROR_TABLE.values()} | set(HTTP_ROWS)
    (advice,) = re.findall(r"^Safe to send again.*?\n\n", TEXT, re.M | re.S)
    named = set(inline_code(advice.split("Retrievals")[0]))
    assert named
    assert named <= known
