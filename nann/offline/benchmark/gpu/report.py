"""The report's text: everything in it comes from the JSON beside it, and what is missing there is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nann.offline.benchmark.gpu.verdict import (
    AIM_PAIRS_PER_S,
    AIM_QPS,
    CHEAPEST_AIM_QPS,
    GATE,
    judge,
    where_time_goes,
)

__all__ = ["NO_FIGURE", "report_text"]

NO_FIGURE = "No GPU figure exists yet."

_HOW = """## How to run it

    make gpu-report                                        # at most 8 minutes on one GPU; writes this page
    make gpu-report ARGS='--device cpu --items 20000'      # the rehearsal
    make test-gpu                                          # the tests that need a GPU, and one summary

`PYTHON=…` picks a Python that has numpy, numba, jax (with its CUDA plugin) and cupy; nothing else is needed,
and pytest for the tests. compute-sanitizer comes with CUDA's toolkit; the contract suite, which `make
test-gpu` also runs, needs hypothesis, pytest-asyncio, pydantic and polars. Every step of the report has its
own share of the time, and what is cut, fails or finds no time left is listed above with the reason.
"""
_HEADINGS = {
    "exhaustive": "Exhaustive scan",
    "settings": "Settings",
    "rivals": "Inner product and rerank",
    "lanes and batches": "Lanes and batches",
    "gate": "At NANN's load",
    "cheapest": "The cheapest search that reaches the recall",
    "single queries": "Single queries",
    "profile": "Where a search's time goes",
    "tile rows": "Rows a tile",
    "buckets": "Choosing a bucket",
}


def report_text(report: Mapping[str, Any]) -> str:
    """Markdown of one report (`nann.cli.gpu_report` writes both)."""
    steps = report["steps"]
    on_gpu = report["device"] != "cpu"
    parts = [_head(report, on_gpu), _verdict(report, on_gpu), _machine(report), _world(report)]
    parts += [
        _found(steps, ("exhaustive", "settings", "rivals"), report),
        _loads(steps, ("gate", "cheapest", "single queries", "lanes and batches"), report),
        _profile(steps),
        _shapes(steps),
        _times(steps),
        _not_run(steps),
        _HOW,
    ]
    return "\n".join(part for part in parts if part)


def _head(report: Mapping[str, Any], on_gpu: bool) -> str:
    command = f"Written by `{report['command']}`; do not edit."
    what = (
        "The engine's search over a made-up corpus of NANN's dimensions, in process behind the service's "
        "batcher, without a transport. `report.json` beside the command's output has all figures."
    )
    if on_gpu:
        return f"# On a GPU\n\n{command}\n\n{what}\n"
    return (
        f"# On a GPU\n\n{command}\n\n**{NO_FIGURE}** No line below was measured on a GPU: it "
        "is the rehearsal of `make gpu-report` on a CPU, with a small corpus, to show that the command runs "
        "and what it prints. None of its figures says anything about a GPU, and on a corpus this small even "
        f"its recalls say little.\n\n{what}\n"
    )


def _verdict(report: Mapping[str, Any], on_gpu: bool) -> str:
    steps = report["steps"]
    loads = [row for name in ("gate", "lanes and batches") for row in _rows(steps, name)]
    nann = steps.get("settings", {}).get("figures", {}).get("nann_load")
    loads = [row for row in loads if row["setting"] == nann]
    verdict = judge(loads, items=report["items"], on_gpu=on_gpu)
    lines = [
        "## Verdict",
        "",
        f"Gate: {GATE.qps:,.0f} QPS (ten times NANN's T4) at {GATE.pairs_per_s / 1e6:,.0f} M scored pairs/s, "
        f"p99 {GATE.p99_ms:g} ms, recall@200 {GATE.recall}, {GATE.items_scored:,} items scored a query, over "
        f"{GATE.items:,} items. **{verdict['words'][0].upper()}{verdict['words'][1:]}.**",
        "",
    ]
    if verdict["met"] is False:
        lines += [*_longest(steps, nann), ""]
    if on_gpu:
        best = max(loads, key=lambda row: row["qps"], default=None)
        cheap = max(_rows(steps, "cheapest"), key=lambda row: row["qps"], default=None)
        lines += [
            f"Aim at NANN's load: {AIM_QPS:,} QPS ({AIM_PAIRS_PER_S / 1e6:,.0f} M pairs/s); most measured: "
            f"{_load_words(best)}. Aim of the cheapest search: {CHEAPEST_AIM_QPS:,} QPS; most measured: "
            f"{_load_words(cheap)}.",
            "",
        ]
    return "\n".join(lines)


def _longest(steps: Mapping[str, Any], setting: Any) -> list[str]:
    """What a missed gate spends its time on."""
    profiled = next((row for row in _rows(steps, "profile") if row["setting"] == setting), None)
    if profiled is None:
        return ["Where its time goes was not measured."]
    phases = where_time_goes(profiled)[:3]
    words = [f"{name} {ms:.2f} ms ({share:.0%}: {remedy})" for name, ms, share, remedy in phases]
    return [f"Where a search's time goes at NANN's load, and what would remove it: {'; '.join(words)}."]


def _load_words(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "not run"
    recall = "unknown" if row["recall"] is None else f"{row['recall']:.4f}"
    return f"{row['qps']:,.0f} QPS, {row['pairs_per_s'] / 1e6:,.1f} M pairs/s, recall {recall}"


def _machine(report: Mapping[str, Any]) -> str:
    lines = ["## Machine", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items() if value]
    if ceilings := report["steps"].get("ceilings", {}).get("figures"):
        lines += [
            f"- ceilings, measured: copy {ceilings['copy_bytes_per_s'] / 1e9:,.0f} GB/s (read and written, "
            f"of {ceilings['copy_bytes'] / 2**20:,.0f} MiB), {ceilings['matmul_dtype']} product "
            f"{ceilings['matmul_flops'] / 1e12:,.2f} TFLOP/s ({ceilings['matmul_size']:,}²)"
        ]
    return "\n".join([*lines, ""])


def _world(report: Mapping[str, Any]) -> str:
    steps = report["steps"]
    lines = ["## Corpus, graph and model", ""]
    if corpus := steps.get("corpus", {}).get("figures"):
        lines += [
            f"- {corpus['items']:,} items of 64 dimensions in clusters within clusters; "
            f"{corpus['users']:,} users of "
            f"three to six interests with {corpus['mean_history']:.0f} history items on average",
            "- NANN's model with attention, weights made by hand, folded: "
            f"{corpus['multiply_adds_a_pair']:,} multiply-adds a scored pair, in {report['precision']}",
        ]
    if graph := steps.get("graph", {}).get("figures"):
        lines += [
            f"- graph of degree 32 (mean {graph['mean_degree']:.1f}), {graph['entry_points']:,} entry "
            f"points, {graph['unreachable']:,} items unreachable from them"
        ]
    if warm := steps.get("warm-up", {}).get("figures"):
        same = "the same bits in every shape" if warm["bit_equal"] else "other bits in some shapes"
        lines += [f"- {warm['programs']} compiled programs; a pair scores {same}"]
    if oracle := steps.get("oracle", {}).get("figures"):
        lines += [
            f"- against the model in NumPy float32 ({oracle['users']} users): scores differ by at most "
            f"{oracle['largest_difference']:.2g}, recall@200 of the exhaustive scan {oracle['recall']:.4f}"
        ]
    rival = next((row for row in _rows(steps, "rivals") if " 1,000 " in row["name"]), None)
    if rival:
        words = "not an easy corpus" if rival["recall"] <= 0.9 else "TOO EASY a corpus: more than 0.9"
        lines += [f"- recall@200 of inner-product top 1,000 + rerank: {rival['recall']:.3f} ({words})"]
    return "\n".join([*lines, ""])


def _found(steps: Mapping[str, Any], names: Sequence[str], report: Mapping[str, Any]) -> str:
    rows = [row for name in names for row in _rows(steps, name)]
    if not rows:
        return ""
    settings = steps.get("settings", {}).get("figures", {})
    marks = {settings.get("nann_load"): " (NANN's load)", settings.get("cheapest"): " (the cheapest)"}
    if settings.get("nann_load") == settings.get("cheapest"):
        marks = {settings.get("cheapest"): " (NANN's load, the cheapest)"}
    table = [
        (
            row["name"] + marks.get(row["name"], ""),
            _number(row["recall"], ".4f") or "exact",
            _number(row["recall_p5"], ".3f"),
            f"{row['mean_items_scored']:,.0f}",
            f"{row['steps']:.1f}",
            f"{row['ms_a_batch']:.2f}",
            f"{row['qps']:,.0f}",
            f"{row['pairs_per_s'] / 1e6:,.1f}",
            _share(row["pairs_per_s"], report),
            f"{row['launches_a_search']:.0f} + {row['programs_a_search']:.0f}",
        )
        for row in rows
    ]
    head = (
        "setting",
        "recall@200",
        "5th pct.",
        "scored",
        "steps",
        "ms a search",
        "QPS",
        "M pairs/s",
        "of floor",
        "launches",
    )
    notes = [
        f"One lane, batches of {rows[0]['batch']}, one after another, {rows[0]['users']} users. *Of floor*: "
        "the share of the measured rate of matrix products that the model's multiply-adds alone make up. "
        "*Launches* a search: the engine's own kernels + calls of the model's programs, each of which is "
        "several kernels."
    ]
    if settings and not settings["cheapest_reaches"]:
        notes.append(f"No setting tried reached {GATE.recall}; the one with the best recall stands in.")
    if settings and not settings["nann_load_reaches"]:
        notes.append(f"No setting tried scored {GATE.items_scored:,} items; the nearest stands in.")
    return "\n".join(["## Settings and rivals", "", *notes, "", *_table(head, table), ""])


def _loads(steps: Mapping[str, Any], names: Sequence[str], report: Mapping[str, Any]) -> str:
    parts = []
    for name in names:
        rows = _rows(steps, name)
        if not rows:
            continue
        table = [
            (
                row["setting"],
                row["lanes"],
                row["batch"],
                "closed" if row["loop"] == "closed" else f"open, {row['offered_qps']:,.0f}",
                f"{row['qps']:,.0f}",
                f"{row['p50_ms']:.2f}",
                f"{row['p95_ms']:.2f}",
                f"{row['p99_ms']:.2f}",
                f"{row['late_ms']:.2f}",
                f"{row['mean_items_scored']:,.0f}",
                f"{row['pairs_per_s'] / 1e6:,.1f}",
                _share(row["pairs_per_s"], report),
                _number(row["recall"], ".4f"),
                f"{row['launches_a_search']:.0f}",
                f"{row['mean_batch']:.1f}",
                row["failures"],
            )
            for row in rows
        ]
        head = (
            "setting",
            "lanes",
            "batch",
            "loop, QPS",
            "QPS",
            "p50 ms",
            "p95 ms",
            "p99 ms",
            "sent late, p99 ms",
            "scored",
            "M pairs/s",
            "of floor",
            "recall@200",
            "launches a search",
            "queries a search",
            "failed",
        )
        group = "single queries, each checked on arrival" if name == "single queries" else "groups of a batch"
        note = (
            f"Requests are {group}. Open loop: random arrivals at the stated rate, latency from the "
            "scheduled arrival, queue included; closed loop: two groups in flight a lane."
        )
        parts += [f"## {_HEADINGS[name]}", "", note, "", *_table(head, table), ""]
    return "\n".join(parts)


def _profile(steps: Mapping[str, Any]) -> str:
    parts = []
    for row in _rows(steps, "profile"):
        table = [
            (name, f"{ms:.3f}", f"{share:.0%}", remedy) for name, ms, share, remedy in where_time_goes(row)
        ]
        parts += [
            f"{row['setting']}, one search of {row['batch']} queries: {row['plain_ms']:.2f} ms as it runs, "
            f"{row['total_ms']:.2f} ms with the device waited for after each phase, as below.",
            "",
            *_table(("phase", "ms", "share", "what it is, and what shortens it"), table),
            "",
        ]
    return "\n".join(["## Where a search's time goes", "", *parts]) if parts else ""


def _shapes(steps: Mapping[str, Any]) -> str:
    parts = []
    if rows := _rows(steps, "tile rows"):
        table = [
            (
                row["tile_rows"],
                f"{row['pairs']:,}",
                f"{row['ms']:.3f}",
                f"{row['pairs_per_s'] / 1e6:,.1f}",
                f"{row['padding']:.3f}",
                f"{row['useful_pairs_per_s'] / 1e6:,.1f}",
            )
            for row in rows
        ]
        head = ("rows a tile", "pairs a call", "ms a call", "M pairs/s", "padding", "M useful pairs/s")
        setting = steps["tile rows"]["figures"]["setting"]
        note = f"The largest program alone; padding is rows computed for each candidate of {setting}."
        parts += ["## Rows a tile", "", note, "", *_table(head, table), ""]
    if rows := _rows(steps, "buckets"):
        speeds = [(row["name"], f"{row['ms_a_batch']:.2f}", f"{row['qps']:,.0f}") for row in rows]
        note = "What choosing the scorer's shape by each step's count saves; the count is read in both rows."
        parts += ["## Choosing a bucket", "", note, "", *_table(("", "ms a search", "QPS"), speeds), ""]
    return "\n".join(parts)


def _times(steps: Mapping[str, Any]) -> str:
    spent = [f"{name} {step['seconds']:.0f} s" for name, step in steps.items() if step["status"] != "not run"]
    return f"Time spent: {', '.join(spent)}.\n" if spent else ""


def _not_run(steps: Mapping[str, Any]) -> str:
    missing = [(name, step) for name, step in steps.items() if step["status"] != "done"]
    if not missing:
        return "## Not run\n\nNothing was left out.\n"
    words = {"cut": "cut short", "failed": "failed", "not run": "not run"}
    lines = [f"- **{name}**: {words[step['status']]}: {step['why']}" for name, step in missing]
    return "\n".join(["## Not run", "", *lines, ""])


def _rows(steps: Mapping[str, Any], name: str) -> list[Any]:
    return list(steps.get(name, {}).get("figures", {}).get("rows", []))


def _share(pairs_per_s: float, report: Mapping[str, Any]) -> str:
    figures = report["steps"].get("ceilings", {}).get("figures")
    corpus = report["steps"].get("corpus", {}).get("figures")
    if not figures or not corpus:
        return "unknown"
    return f"{2 * corpus['multiply_adds_a_pair'] * pairs_per_s / figures['matmul_flops']:.1%}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join('---' if not i else '---:' for i in range(len(head)))}|"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]
