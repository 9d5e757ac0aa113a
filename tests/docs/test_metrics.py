"""docs/metrics.md has every metric with its labels, and no document names one that is not there."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from documents import DOCS, code_blocks, inline_code, markdown_files, plain, table
from metric_catalog import FAMILIES, LABELS, SERIES, check_promql

from nann.service.batcher import DispatchReason, RejectReason
from nann.service.metrics import ShadowOutcome

TEXT = (DOCS / "metrics.md").read_text(encoding="utf-8")
ROWS = {plain(row["metric"]): row for row in table(TEXT, "metric", "type", "labels", "how to read it")}
PROMQL = [block.text for block in code_blocks(TEXT) if block.language == "promql"]


def test_every_metric_has_a_row_and_every_row_a_metric() -> None:
    assert len(FAMILIES) > 10
    assert set(ROWS) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_has_the_type_and_the_labels(name: str) -> None:
    assert ROWS[name]["type"] == FAMILIES[name].type
    assert tuple(filter(None, plain(ROWS[name]["labels"]).split(", "))) == LABELS[name]


def test_labels_were_found() -> None:
    assert LABELS["nann_requests_total"] == ("api", "method", "model", "code")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("nann_batches_total", get_args(DispatchReason)),
        ("nann_rejected_total", get_args(RejectReason)),
        ("nann_shadow_samples_total", get_args(ShadowOutcome)),
    ],
)
def test_every_reason_is_explained(name: str, values: tuple[str, ...]) -> None:
    flags = {code for code in inline_code(ROWS[name]["how to read it"]) if not code.startswith("-")}
    assert flags == set(values)


def test_there_are_queries_to_copy() -> None:
    assert len(PROMQL) >= 3


@pytest.mark.parametrize("query", PROMQL)
def test_a_query_selects_series_and_labels_that_exist(query: str) -> None:
    check_promql(query)


def test_no_document_names_a_metric_that_is_not_there() -> None:
    named = {
        (path.name, word)
        for path in markdown_files()
        for code in inline_code(path.read_text(encoding="utf-8"))
        for word in re.findall(r"\bnann_\w+", code)
    }
    packages = {"nann_client"}
    assert not {(file, word) for file, word in named if word not in {*FAMILIES, *SERIES, *packages}}
