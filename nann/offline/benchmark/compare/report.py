"""The comparison as a page: what the rules are, then one part a corpus, from the JSON of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nann.offline.benchmark.compare.contender import Skipped

__all__ = ["page"]

Row = Mapping[str, Any]
_PORT = "TF 2 port"
_NONE = "–"

_FRAME = """\
# Benchmarks

Every way to retrieve the same 200 items, side by side: the same trained model, corpus and users, in one run
on one machine. `make bench` writes this page anew over the synthetic catalogue and MovieLens-1M (30 minutes
on two cores, with the training), `make bench-full` with Brunch and 1.3 million synthetic items beside them;
`nann compare` is the command behind both. What it measured before in the same work directory stays on the
page, with the machine and the commit it was measured on. Figures, sweeps and per-setting intervals are in
`report.json` in that directory.

## Rules

- **recall@200** is the share of the exhaustive top 200 under the same model that is answered, by score with
  ties; mean and 5th percentile over users, with 95 % bootstrap intervals over users. hit_rate@200 is beside
  it: the held-out item is among those answered. *level's at this mean*: the 5th percentile of `level` on
  NANN's graph where its mean is the row's, on straight lines between its settings.
- **cost** is the number of items that the model scored, and all other multiply-adds of the query (the
  user's side of the model, inner products, gates) divided by those of one score. It is counted, not timed.
- **Settings are chosen on validation users and reported on test users**: for each recall target the
  cheapest setting of each contender whose mean recall on validation users reaches it. Its recall on test
  users may lie a little lower.
- **latency** is that of single requests, one in flight, from the history's ids to the answer's (of the
  indexes: from item rows to item rows); p50 and p99 over all rounds. **QPS** is that of a closed loop which
  keeps every core busy, the median of the rounds. Warm-up is not counted. Contenders take turns in every
  round, in a new order each.
- Answers of contenders that do not know the model's scores are scored afterwards, at no cost to them.
- **level ÷ cost** is the cost of `level` on NANN's graph (the cheapest of its sweep that reaches the
  target) divided by this row's; its interval resamples users for both together.

## Contenders

- `best_first` and further modes: this engine's own search. `level`: NANN's served search in this engine, on
  the graph that NANN publishes (`nann index --preset nann`) and on the artifact's own.
- `TF 2 port`: NANN's served search as one graph of stock TensorFlow operations (`nann export --format
  tf-serving`), in a process of its own, with TensorFlow's own threads or one thread, whichever is faster. Its
  recall and items scored are those of this engine's `level` at the same setting, with which it agrees.
- `exhaustive`: every item through the same compiled model.
- faiss HNSW and IVF, hnswlib, ScaNN: over the best inner-product vectors there are, alone and with the deep
  model ranking 1,000 to 20,000 candidates. ScaNN runs in an environment of its own; the time of its
  two-stage form is the sum of both halves.
"""


def page(reports: Sequence[Row], skipped: Sequence[Skipped]) -> str:
    """The page for these corpora, in their order. Plots are ``benchmarks/<name>.png`` beside it."""
    left_out = [f"## {one.contender}\n\nNot measured: {one.reason}.\n" for one in skipped]
    nothing = [] if reports or skipped else ["Nothing has been measured yet.\n"]
    return "\n".join([_FRAME, *(_corpus(report) for report in reports), *left_out, *nothing])


def _corpus(report: Row) -> str:
    corpus, name = report["corpus"], report["name"]
    hit = corpus["hit_rate_exhaustive"]
    graphs, training = corpus["graphs"], corpus["training"]
    lines = [
        f"## {name}",
        "",
        f"{corpus['num_items']:,} items, model `{corpus['model']}` ({training.get('step', 0):,} training "
        f"steps of {training.get('batch_size', 0)}), hit_rate@{corpus['k']} of the exhaustive search "
        f"{_percent(hit['mean'])} ({_percent(hit['low'])} to {_percent(hit['high'])}). One score is "
        f"{corpus['multiply_adds']['score']:,.0f} multiply-adds, the user's side "
        f"{corpus['multiply_adds']['encode']:,.0f} once a query, both counted in the model's graph. "
        f"Own graph: {_graph(graphs['own'])}; NANN's: {_graph(graphs['nann'])}. "
        f"{corpus['n_tune']:,} validation users, {corpus['n_test']:,} test users.",
        "",
        f"Counts: {_machine(report['machine'])}",
        "",
    ]
    timing = report["timing"]
    if timing:
        lines += [
            f"Times: {_machine(timing['machine'])}; {timing['rounds']} rounds, {timing['users']} users, "
            f"{timing['lanes']} lanes, engine {corpus['placement']}",
            "",
        ]
    else:
        lines += ["No times were taken.", ""]
    for target in report["targets"]:
        lines += [*_target(report, target), ""]
    lines += [f"![recall against cost, throughput and latency on {name}](benchmarks/{name}.png)", ""]
    lines += _notes(report)
    return "\n".join(lines)


def _target(report: Row, target: Row) -> list[str]:
    k = report["corpus"]["k"]
    times = {(row["contender"], row["setting"]): row for row in (report["timing"] or {"rows": []})["rows"]}
    found = {row["contender"]: times.get((row["contender"], row["setting"])) for row in target["rows"]}
    port = max(
        (row["median_qps"] for name, row in found.items() if row and name.startswith(_PORT)), default=None
    )
    scan = next((row["median_qps"] for row in times.values() if row["contender"] == "exhaustive"), None)
    head = [
        "contender", "setting", f"recall@{k}", "5th percentile", "level's at this mean", "hit rate",
        "items scored", "cost", "level ÷ cost",
    ]  # fmt: skip
    if times:
        head += ["p50 ms", "p99 ms", "QPS", "QPS ÷ TF port", "QPS ÷ exhaustive"]
    rows = []
    for row in target["rows"]:
        ratio = row["baseline_over_cost"]
        cells = [
            _bold(row["contender"], row is target["rows"][0]),
            row["setting"],
            f"{_interval(row['recall'], 4)}",
            _interval(row["recall_p5"], 3),
            _level_percentile(report, target["baseline"], row["recall"]["mean"]),
            _percent(row["hit_rate"]["mean"]),
            f"{row['n_scored']:,.0f}",
            f"{row['cost']['mean']:,.0f}",
            _NONE if ratio is None else _interval(ratio, 2),
        ]
        if times:
            cells += _times(found[row["contender"]], port, scan)
        rows.append(cells)
    lines = [f"### recall@{k} ≥ {target['target']:g}", ""]
    lines += _table(head, rows) if rows else ["No contender reaches it."]
    if target["missed"]:
        missed = ", ".join(
            f"{row['contender']} (best {row['recall']:.3f} at {row['cost']:,.0f})" for row in target["missed"]
        )
        lines += ["", f"Not reached by any setting of: {missed}."]
    return lines


def _level_percentile(report: Row, baseline: str, mean: float) -> str:
    """The 5th percentile of the baseline where its mean recall is `mean`: on a line between its settings."""
    measured: list[Row] = next(
        (one["reported"] for one in report["contenders"] if one["name"] == baseline), []
    )
    points = sorted((one["recall"]["mean"], one["recall_p5"]["mean"]) for one in measured)
    if not points or not points[0][0] <= mean <= points[-1][0]:
        return _NONE
    means, percentiles = (np.array(values) for values in zip(*points, strict=True))
    return f"{np.interp(mean, means, percentiles):.3f}"


def _times(row: Row | None, port_qps: float | None, scan_qps: float | None) -> list[str]:
    if row is None:
        return [_NONE] * 5
    qps = row["median_qps"]
    return [
        f"{row['p50_ms']:.1f}",
        f"{row['p99_ms']:.1f}",
        _figure(qps),
        _NONE if port_qps is None else _figure(qps / port_qps),
        _NONE if scan_qps is None else _figure(qps / scan_qps),
    ]


def _notes(report: Row) -> list[str]:
    vectors = report["vectors"]
    lines = ["Notes", ""]
    if vectors["chosen"] is not None:
        shares = "; ".join(f"{name}: {_percent(share)}" for name, share in vectors["share_within"].items())
        lines += [
            "- Inner-product vectors, by the share of validation users' exhaustive answers among their 5,000 "
            f"nearest items (or a tenth of the corpus): {shares}. Used: {vectors['chosen']}."
        ]
    noted: dict[str, list[str]] = {}
    for one in report["contenders"]:
        noted.setdefault(one["note"], []).append(one["name"])
    lines += [f"- {'; '.join(names)}: {note}." for note, names in noted.items() if note]
    lines += [f"- **{one['contender']} was left out**: {one['reason']}." for one in report["skipped"]]
    if only := report.get("only"):
        lines += [f"- Of the contenders only these were asked for: {', '.join(only)}, exhaustive (`--only`)."]
    return [*lines, ""]


def _graph(graph: Row) -> str:
    if "m" not in graph:
        return "not told"  # of an index that nann index did not build
    return f"M {graph['m']}, efConstruction {graph['ef_construction']}, {graph['space']}"


def _machine(machine: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load_average']:g} before; "
        f"Python {machine['python']}, {versions}; commit {machine['commit'] or 'unknown'}; "
        f"{machine['measured_at']}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    align = ["---", "---", *["---:"] * (len(head) - 2)]
    return ["| " + " | ".join(cells) + " |" for cells in [head, align, *rows]]


def _bold(text: str, wanted: bool) -> str:
    return f"**{text}**" if wanted else text


def _interval(interval: Row, digits: int) -> str:
    return f"{interval['mean']:.{digits}f} ({interval['low']:.{digits}f} to {interval['high']:.{digits}f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _figure(value: float) -> str:
    """Three digits, without more than there are."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
