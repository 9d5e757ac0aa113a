"""What was measured, as the section of docs/growth.md that a command writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nann.offline.benchmark.growth.searching import K

__all__ = ["MAP_TARGET_S", "SERVED_EF", "growth_section", "search_at"]

MAP_TARGET_S = 3.0  # for `Artifact.open` of 4 million items with --verify fast
SERVED_EF = 400  # the profile `balanced`
_RECALL = 0.95

Result = Mapping[str, Any]


def growth_section(results: Sequence[Result]) -> str:
    """Markdown of all tables; sizes ascending."""
    if not results:
        raise ValueError("nothing was measured")
    options = results[0]["options"]
    return "\n\n".join(
        [
            _words(results, options),
            "### Search",
            f"One query in flight, k {K}, `best_first` with ef {SERVED_EF} (the profile `balanced`); recall "
            f"against the exhaustive answer of the same model for {options['users']} users. Time: median and "
            "95th percentile, and the processor time of all threads.",
            _search_table(results),
            f"The smallest ef of those tried that reaches recall {_RECALL}:",
            _recall_table(results),
            "### Memory and disk",
            "Artifact: all files, and the largest kinds of them. *Loaded*, *in use*: anonymous memory of a "
            "process that searches with two lanes; mapped files are the page cache's.",
            _memory_table(results),
            "### Map and verify",
            "`Artifact.open`, processor time in brackets; cold: nothing of the version is in the page cache. "
            "*Of the ceiling*: what a full verification (warm) takes a second of processor time, against "
            "what SHA-256 alone takes from memory. The last two: SHA-256 on all cores at once, and a plain "
            "cold reading of the same files.",
            _open_table(results),
            "### Load",
            "The parts of `SearchEngine.load` (`--verify fast`), warm page cache, and all of it cold. "
            "Warm-up compiles every program; nothing was in XLA's cache.",
            _load_table(results),
            "### Build",
            "`nann index` (graph and repair, and writing it) and `nann export`; processor time in brackets.",
            _build_table(results),
            "Machines: " + "; ".join(dict.fromkeys(_machine(result) for result in results)) + ".",
        ]
    )


def search_at(result: Result, ef: int) -> Mapping[str, Any]:
    """The measured search of this ef."""
    return next(row for row in result["searching"]["searches"] if row["ef"] == ef)


def _words(results: Sequence[Result], options: Mapping[str, Any]) -> str:
    largest = results[-1]
    lines = []
    if len(results) > 1:
        scored = _exponent(results, lambda one: search_at(one, SERVED_EF)["items_scored"])
        cpu = _exponent(results, lambda one: search_at(one, SERVED_EF)["cpu_ms"])
        exact = _exponent(results, _exhaustive_ms)
        lines.append(
            f"From {results[0]['items']:,} to {largest['items']:,} items, at ef {SERVED_EF}: items scored "
            f"grow as N^{scored:.2f}, processor time of a search as N^{cpu:.2f}, of an exhaustive one as "
            f"N^{exact:.2f} (slopes of a straight line through the logarithms)."
        )
    opening = largest["opening"]
    cold, warm = opening["fast_cold"]["wall_s"], opening["fast_warm"]["wall_s"]
    kept = "kept" if max(cold, warm) <= MAP_TARGET_S else "**not kept**"
    lines.append(
        f"{largest['items']:,} items map in {cold:.2f} s cold and {warm:.2f} s warm with `--verify fast` "
        f"(target {MAP_TARGET_S:g} s: {kept}); a full verification of {_size(opening['bytes'])} took "
        f"{opening['full_warm']['wall_s']:.1f} s warm, {opening['full_cold']['wall_s']:.1f} s cold."
    )
    lines.append(f"Seed {options['seed']}, efConstruction {options['ef_construction']}.")
    return " ".join(lines)


def _exponent(results: Sequence[Result], figure: Callable[[Result], float]) -> float:
    sizes = [math.log(one["items"]) for one in results]
    return float(np.polyfit(sizes, [math.log(figure(one)) for one in results], 1)[0])


def _exhaustive_ms(result: Result) -> float:
    """Processor time of one user's exhaustive answer."""
    return float(1000 * result["searching"]["exhaustive_cpu_s"] / result["options"]["users"])


def _search_table(results: Sequence[Result]) -> str:
    rows = []
    for one in results:
        row = search_at(one, SERVED_EF)
        rows.append(
            [
                f"{row['recall']:.4f}",
                f"{row['recall_p5']:.3f}",
                f"{row['items_scored']:,.0f}",
                f"{100 * row['items_scored'] / one['items']:.2f} %",
                f"{row['steps']:.1f}",
                f"{row['p50_ms']:.1f}",
                f"{row['p95_ms']:.1f}",
                f"{row['cpu_ms']:.1f}",
                f"{_exhaustive_ms(one):,.0f}",
            ]
        )
    head = [f"recall@{K}", "5th pct.", "scored", "share", "steps", "p50 ms", "p95 ms", "CPU ms"]
    return _table([*head, "exhaustive, CPU ms"], results, rows)


def _recall_table(results: Sequence[Result]) -> str:
    rows = []
    for one in results:
        found = next((row for row in one["searching"]["searches"] if row["recall"] >= _RECALL), None)
        rows.append(
            ["none", "", "", ""]
            if found is None
            else [
                f"{found['ef']:,}",
                f"{found['recall']:.4f}",
                f"{found['items_scored']:,.0f}",
                f"{found['cpu_ms']:.1f}",
            ]
        )
    return _table(["ef", f"recall@{K}", "scored", "CPU ms"], results, rows)


def _memory_table(results: Sequence[Result]) -> str:
    kinds = ("item tensors", "graph", "embeddings", "SavedModel", "histories")
    rows = []
    for one in results:
        sizes, memory = one["build"]["bytes"], one["searching"]
        rows.append(
            [
                _size(sum(sizes.values())),
                f"{sum(sizes.values()) / one['items']:,.0f}",
                *(_size(sizes[kind]) for kind in kinds),
                _size(memory["loaded"]["anonymous_bytes"]),
                _size(memory["searched"]["anonymous_bytes"]),
            ]
        )
    return _table(["artifact", "bytes an item", *kinds, "loaded", "in use"], results, rows)


def _open_table(results: Sequence[Result]) -> str:
    rows = []
    for one in results:
        opening = one["opening"]
        rate = opening["bytes"] / opening["full_warm"]["cpu_s"]
        rows.append(
            [
                *(_seconds(opening[name]) for name in ("fast_cold", "fast_warm", "full_cold", "full_warm")),
                f"{100 * rate / opening['hash_cpu_bytes_per_s']:.0f} %",
                f"{opening['hash_bytes_per_s'] / 1e6:,.0f}",
                f"{opening['disk_bytes_per_s'] / 1e6:,.0f}",
            ]
        )
    head = ["fast, cold s", "fast, warm s", "full, cold s", "full, warm s"]
    return _table([*head, "of the ceiling", "SHA-256 MB/s", "disk MB/s"], results, rows)


def _load_table(results: Sequence[Result]) -> str:
    rows = []
    for one in results:
        phases, cold, searching = one["loading"], one["loading_cold"], one["searching"]
        rows.append(
            [
                *(_wall_and_cpu(phases, name) for name in ("open", "scorer", "tables", "catalog")),
                _wall_and_cpu(searching, "load"),
                f"{sum(cold[f'{name}_s'] for name in ('open', 'scorer', 'tables', 'catalog')):.2f}",
                _wall_and_cpu(searching, "warm_up"),
            ]
        )
    head = ["open s", "model s", "copy of tables s", "catalogue s", "all s", "all, cold s", "warm-up s"]
    return _table(head, results, rows)


def _build_table(results: Sequence[Result]) -> str:
    rows = []
    for one in results:
        build, graph = one["build"], one["build"]["graph"]
        rows.append(
            [
                _wall_and_cpu(build, "index"),
                f"{1e6 * build['index_cpu_s'] / one['items']:,.0f}",
                _wall_and_cpu(build, "export"),
                _size(build["peak_bytes"]),
                str(build["ef_construction"]),
                f"{graph['unreachable_before_repair']['entry_points']:,}",
            ]
        )
    head = ["index s", "CPU µs an item", "export s", "peak memory", "efConstruction", "items repaired"]
    return _table(head, results, rows)


def _machine(result: Result) -> str:
    machine = result["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB, commit "
        f"{machine['commit'] or 'unknown'}, {result['items']:,} items at load {machine['load_average']:g}"
    )


def _table(head: Sequence[str], results: Sequence[Result], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| items | " + " | ".join(head) + " |", "|---:" * (len(head) + 1) + "|"]
    for one, row in zip(results, rows, strict=True):
        lines.append(f"| {one['items']:,} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _seconds(figure: Mapping[str, float]) -> str:
    return f"{figure['wall_s']:.2f} ({figure['cpu_s']:.2f})"


def _wall_and_cpu(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[f'{name}_s']:,.1f} ({figures[f'{name}_cpu_s']:,.1f})"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.0f} MB"
