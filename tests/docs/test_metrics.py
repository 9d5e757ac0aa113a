"""docs/metrics.md has every metric with its labels, and no document names one that is not there."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from documents import DOCS, code_blocks, inline_code, markdown_files, plain, table
from prometheus_client.core import Metric

from nann.service.batcher import DispatchReason, RejectReason
from nann.service.errors import ERROR_TABLE
from nann.service.metrics import Metrics

TEXT = (DOCS / "metrics.md").read_text(encoding="utf-8")
ROWS = {plain(row["metric"]): row for row in table(TEXT, "metric", "type", "labels", "how to read it")}
METRICS = Metrics()


def _exposed_name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


FAMILIES = {
    _exposed_name(family): family
    for family in METRICS.registry.collect()
    if not family.name.startswith("process_")
}
LABELS: dict[str, tuple[str, ...]] = {
    name: next(
        (
            metric._labelnames
            for metric in vars(METRICS).values()
            if getattr(metric, "_name", None) == family.name
        ),
        (),
    )
    for name, family in FAMILIES.items()
}
SERIES = {
    series: name
    for name, family in FAMILIES.items()
    for series in (
        (f"{name}_bucket", f"{name}_sum", f"{name}_count") if family.type == "histogram" else (name,)
    )
}
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
    [("nann_batches_total", get_args(DispatchReason)), ("nann_rejected_total", get_args(RejectReason))],
)
def test_every_reason_is_explained(name: str, values: tuple[str, ...]) -> None:
    flags = {code for code in inline_code(ROWS[name]["how to read it"]) if not code.startswith("-")}
    assert flags == set(values)


def test_there_are_queries_to_copy() -> None:
    assert len(PROMQL) >= 3


@pytest.mark.parametrize("query", PROMQL)
def test_a_query_selects_series_and_labels_that_exist(query: str) -> None:
    selected = re.findall(r"\b(nann_\w+)(?:\{([^}]*)\})?", query)
    assert selected
    known_labels = {"le", "instance"}
    for series, matchers in selected:
        assert series in SERIES
        labels = LABELS[SERIES[series]]
        known_labels |= set(labels)
        assert set(re.findall(r"(\w+)=", matchers)) <= set(labels)
        for codes in re.findall(r'code=~"([^"]+)"', matchers):
            assert set(codes.split("|")) <= {row.code for row in ERROR_TABLE.values()}
    for grouping in re.findall(r"(?:by|on) \(([^)]*)\)", query):
        assert set(grouping.split(", ")) <= known_labels


def test_no_document_names_a_metric_that_is_not_there() -> None:
    named = {
        (path.name, word)
        for path in markdown_files()
        for code in inline_code(path.read_text(encoding="utf-8"))
        for word in re.findall(r"\bnann_\w+", code)
    }
    assert not {(file, word) for file, word in named if word not in {*FAMILIES, *SERIES}}
