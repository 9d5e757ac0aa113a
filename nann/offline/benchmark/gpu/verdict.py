"""The gate of the report: whether a measured load meets it, and where the time goes when none does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["AIM_PAIRS_PER_S", "AIM_QPS", "CHEAPEST_AIM_QPS", "GATE", "Gate", "judge", "where_time_goes"]


@dataclass(frozen=True, slots=True)
class Gate:
    """What one open-loop load must reach at once."""

    qps: float
    pairs_per_s: float
    p99_ms: float
    recall: float
    items_scored: float
    items: int

    def misses(self, load: Mapping[str, Any]) -> list[str]:
        """In words, what the load does not reach."""
        at_least = (
            ("qps", "QPS", self.qps, ",.0f"),
            ("pairs_per_s", "scored pairs/s", self.pairs_per_s, ",.0f"),
            ("recall", "recall@200", self.recall, ".4f"),
            ("mean_items_scored", "items scored a query", self.items_scored, ",.0f"),
        )
        missed = [
            f"{format(load[key], form)} {words}, not {format(wanted, form)}"
            for key, words, wanted, form in at_least
            if load[key] is None or load[key] < wanted
        ]
        if not load["p99_ms"] <= self.p99_ms:  # so that NaN misses
            missed.append(f"p99 {load['p99_ms']:.1f} ms, not {self.p99_ms:g} ms")
        return missed


# Ten times NANN's T4: 624 QPS of about 17,000 items scored each (reference/nann.md, "Published results"), at
# its corpus size; 6,240 × 17,000 are 106 million pairs a second.
GATE = Gate(qps=6240, pairs_per_s=106e6, p99_ms=10, recall=0.99, items_scored=17_000, items=1_300_000)
AIM_QPS = 33_000  # at NANN's load
AIM_PAIRS_PER_S = 560e6
CHEAPEST_AIM_QPS = 100_000  # with the cheapest search that reaches the gate's recall

_REMEDIES = {
    "encode": "the users' tensors: one program a search; larger batches spread it",
    "expand": "graph rows read at random and bits set; then the host's one wait of the step",
    "gather": "copies of item rows, whose floor is bandwidth; a scorer that reads the tables removes it",
    "score": "the model's programs, whose floor is arithmetic; less padding, larger shapes, fused layers",
    "merge": "one block a query; fewer steps (a wider frontier) or a narrower pool shorten it",
    "results": "Python on the host, which makes the answers' lists; lanes overlap it with the device",
    "scan": "the matrix product of all item vectors and its selection",
}


def judge(
    loads: Sequence[Mapping[str, Any]], *, items: int, on_gpu: bool, gate: Gate = GATE
) -> dict[str, Any]:
    """Which of the open-loop loads meets the gate best, or what the best of them misses."""
    if not on_gpu:
        return {"met": None, "words": "not judged: nothing here was measured on a GPU"}
    if items < gate.items:
        return {"met": None, "words": f"not judged: {items:,} items are fewer than {gate.items:,}"}
    judged = [(gate.misses(load), load) for load in loads if load["loop"] == "open" and not load["failures"]]
    if not judged:
        return {"met": None, "words": "not judged: no load was measured without failures"}
    misses, best = min(judged, key=lambda pair: (len(pair[0]), -pair[1]["qps"]))
    figures = (
        f"{best['qps']:,.0f} QPS at {best['pairs_per_s'] / 1e6:,.0f} M pairs/s, p99 {best['p99_ms']:.1f} ms, "
        f"recall@200 {best['recall']:.4f}, {best['mean_items_scored']:,.0f} items scored a query"
    )
    if misses:
        return {"met": False, "words": f"missed: {'; '.join(misses)} (best load: {figures})", "load": best}
    return {"met": True, "words": f"met: {figures}", "load": best}


def where_time_goes(profile: Mapping[str, Any]) -> list[tuple[str, float, float, str]]:
    """(phase, ms, share, what it is and what would shorten it), the longest first."""
    phases = profile["phases_ms"]
    total = sum(phases.values()) or 1.0
    ordered = sorted(phases.items(), key=lambda pair: -pair[1])
    return [(name, ms, ms / total, _REMEDIES.get(name, "")) for name, ms in ordered]
