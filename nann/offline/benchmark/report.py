"""A benchmark's result as a person reads it, and as a machine does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from nann.offline.benchmark.machine import Machine
from nann.offline.benchmark.overhead import Overhead, Saturation
from nann.offline.benchmark.percentiles import LatencyBlock
from nann.offline.benchmark.run import LoadResult, Round, Summary

__all__ = ["OVERHEAD_TARGET", "PADDING_TARGET", "load_json", "load_text", "overhead_json", "overhead_text"]

# What the engine promises of itself: docs/results.md.
OVERHEAD_TARGET = 1.25
PADDING_TARGET = 0.20

_ROWS = {
    "count": "count",
    "min_us": "min",
    "max_us": "max",
    "mean_us": "mean",
    "stddev_us": "stddev",
    "median_us": "median",
    "p75_us": "75 %",
    "p95_us": "95 %",
    "p98_us": "98 %",
    "p99_us": "99 %",
    "p99_9_us": "99.9 %",
}
_COLUMNS = {
    "service": "search alone",
    "queue": "queue wait",
    "latency": "latency, queue in it",
    "send_delay": "sent late by",
}


def load_json(results: Sequence[LoadResult], machine: Machine, workload: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was measured, with the machine and the workload it was measured on."""
    return {"machine": asdict(machine), "workload": dict(workload), "loads": [asdict(r) for r in results]}


def load_text(results: Sequence[LoadResult], machine: Machine, workload: Mapping[str, Any]) -> str:
    """NANN's block for each load, then a line for each load with its ratio to the first one."""
    parts = [machine.line(), _words(workload), *(_load_block(result) for result in results)]
    if len(results) > 1 or len(results[0].rounds) > 1:
        parts.append(_comparison(results))
    return "\n\n".join(parts)


def overhead_json(
    results: Sequence[Overhead], machine: Machine, workload: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that was measured, with the machine and the workload it was measured on."""
    return {"machine": asdict(machine), "workload": dict(workload), "overhead": [asdict(r) for r in results]}


def overhead_text(results: Sequence[Overhead], machine: Machine, workload: Mapping[str, Any]) -> str:
    """A block for each saturation: times, ratios, padding, and where a search's time goes."""
    return "\n\n".join([machine.line(), _words(workload), *(_overhead_block(result) for result in results)])


def _load_block(result: LoadResult) -> str:
    pooled = result.pooled
    shown = {name: title for name, title in _COLUMNS.items() if getattr(pooled, name) is not None}
    if result.load.rate_qps is None:
        shown.pop("send_delay", None)  # a closed loop has no schedule to be late for
    table = [["µs", *shown.values()]]
    for field in fields(LatencyBlock):
        table.append([_ROWS[field.name], *(f"{getattr(getattr(pooled, n), field.name):,.0f}" for n in shown)])
    facts = [
        f"throughput {_number(result.median(lambda one: one.throughput_qps), 1)} answers/s",
        f"failures {pooled.failures:,} of {pooled.requests:,}{_errors(pooled)}",
        f"items scored a query {_number(pooled.mean_items_scored, 0)}",
        f"batch size {_number(pooled.mean_batch_size, 2)}",
    ]
    title = f"{result.load.name} (rounds: {len(result.rounds)})"
    return "\n".join([title, *_aligned(table), "  " + "; ".join(facts)])


def _errors(summary: Summary) -> str:
    if not summary.errors:
        return ""
    return " (" + ", ".join(f"{code} {count:,}" for code, count in summary.errors.items()) + ")"


def _latency(name: str) -> Callable[[Round], float | None]:
    def figure(one: Round) -> float | None:
        block = one.summary.latency
        return None if block is None else float(getattr(block, name))

    return figure


def _comparison(results: Sequence[LoadResult]) -> str:
    figures: dict[str, Callable[[Round], float | None]] = {
        "answers/s": lambda one: one.throughput_qps,
        "median µs": _latency("median_us"),
        "95 % µs": _latency("p95_us"),
        "99 % µs": _latency("p99_us"),
    }
    head = [f"median of {len(results[0].rounds)} rounds"]
    head += [cell for name in figures for cell in (name, "ratio")]
    table = [head]
    for result in results:
        row = [result.load.name]
        for figure in figures.values():
            row += [_number(result.median(figure), 1), _number(result.ratio(results[0], figure), 2)]
        table.append(row)
    return "\n".join(_aligned(table))


def _overhead_block(result: Overhead) -> str:
    rows = [
        ["search", f"{result.search_ms:,.3f} ms", ""],
        [
            "its scoring calls, replayed",
            f"{result.replay_ms:,.3f} ms",
            f"{result.calls_per_search:.1f} calls",
        ],
        ["  of which the user part", f"{result.encode_ms:,.3f} ms", ""],
        [
            "the same pairs at once",
            f"{result.one_call_ms:,.3f} ms",
            f"{result.calls_at_once_per_search:.1f} calls",
        ],
        [
            "search / replay",
            f"{result.overhead:.3f}",
            f"target ≤ {OVERHEAD_TARGET:g}; {result.overhead_without_encode:.3f} without the user part",
        ],
        ["  in processor time", f"{result.overhead_cpu:.3f}", ""],
        ["replay / at once", f"{result.small_steps:.3f}", "what small steps cost"],
        [
            "padding",
            f"{100 * result.padding:.1f} %",
            f"target ≤ {100 * PADDING_TARGET:g} % of scored rows; "
            f"{100 * result.padding_in_one_call:.1f} % at once",
        ],
        ["items scored a query", f"{result.items_scored_per_query:,.0f}", ""],
    ]
    phases = ", ".join(f"{name} {100 * share:.1f} %" for name, share in result.phases.items())
    title = Saturation(result.lanes, result.batch).name
    heading = f"{title} ({result.searches} searches, median of {len(result.rounds)} rounds)"
    lines = [f"  {name:<29}{value:>13}  {remark}".rstrip() for name, value, remark in rows]
    return "\n".join([heading, *lines, f"  where a search's time goes: {phases}"])


def _words(workload: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in workload.items() if value not in (None, False))


def _number(value: float | None, digits: int) -> str:
    return "not told" if value is None else f"{value:,.{digits}f}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  "
        + row[0].ljust(widths[0])
        + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in table
    ]
