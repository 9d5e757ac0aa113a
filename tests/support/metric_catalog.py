"""Every metric of the service with its type, labels and series, and a reading of PromQL that uses them."""

from __future__ import annotations

import re
from collections.abc import Set
from typing import get_args

from prometheus_client.core import Metric

from nann.service.batcher import DispatchReason, RejectReason
from nann.service.errors import ERROR_TABLE
from nann.service.metrics import Metrics, ShadowOutcome, StoreOperation

__all__ = ["FAMILIES", "LABELS", "SERIES", "check_promql"]

_METRICS = Metrics()
# What Prometheus itself puts on every series of a target.
_TARGET_LABELS = {"job", "instance"}
_VALUES: dict[str, Set[str]] = {
    "code": {row.code for row in ERROR_TABLE.values()} | {"ok"},
    "outcome": set(get_args(ShadowOutcome)),
    "operation": set(get_args(StoreOperation)),
}
_REASONS = {
    "nann_batches_total": set(get_args(DispatchReason)),
    "nann_rejected_total": set(get_args(RejectReason)),
}


def _exposed_name(family: Metric) -> str:
    counted = family.type == "counter" and not family.name.endswith("_total")
    return f"{family.name}_total" if counted else family.name


_ALL = {_exposed_name(family): family for family in _METRICS.registry.collect()}
# Ours, by the name that the type line has.
FAMILIES = {name: family for name, family in _ALL.items() if not name.startswith("process_")}
LABELS: dict[str, tuple[str, ...]] = {
    name: next(
        (
            metric._labelnames
            for metric in vars(_METRICS).values()
            if getattr(metric, "_name", None) == family.name
        ),
        getattr(family, "_labelnames", ()),  # of a collector of our own
    )
    for name, family in _ALL.items()
}
# The metric behind each series, those of the process too.
SERIES = {
    series: name
    for name, family in _ALL.items()
    for series in (
        (f"{name}_bucket", f"{name}_sum", f"{name}_count") if family.type == "histogram" else (name,)
    )
}


def check_promql(query: str) -> None:
    """Assert that the series, labels and label values of a query are those of the service."""
    selected = re.findall(
        r"\b((?:nann|process|up)(?:_\w+)?)\b(?:\{([^}]*)\})?", re.sub(r'"[^"]*"', _quoted, query)
    )
    assert selected, query
    known = {"le", *_TARGET_LABELS}
    for series, matchers in selected:
        assert series in SERIES or series == "up", f"{series}: {query}"
        metric = SERIES.get(series, "up")
        labels = {*LABELS.get(metric, ()), *_TARGET_LABELS}
        known |= labels
        for label, value in re.findall(r'(\w+)(?:=~|!~|!=|=)"([^"]*)"', matchers):
            assert label in labels, f"{label} of {series}: {query}"
            values = _REASONS.get(metric) if label == "reason" else _VALUES.get(label)
            if values is not None and "$" not in value:
                assert set(value.split("|")) <= values, query
    for grouping in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        assert {label.strip() for label in grouping.split(",")} <= known, query


def _quoted(match: re.Match[str]) -> str:
    """A quoted text without what would read as a series or as the end of a selector."""
    return match[0].replace("}", "").replace("{", "") if match[0] != '"nann"' else '"NANN"'
