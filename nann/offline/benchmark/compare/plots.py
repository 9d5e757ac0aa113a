"""Recall against what it costs, one figure a corpus: cost, throughput, latency; Pareto points only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw", "front"]

_LEAST_RECALL = 0.6
_TICKS = (0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
_MISSED = 3e-4  # where "nothing is missed" is drawn on an axis of shares missed
_OWN = ("best_first", "level", "exhaustive", "inner-product")  # this engine: full lines


def front(points: Sequence[tuple[float, float]], *, smaller_is_better: bool) -> list[tuple[float, float]]:
    """Of (recall, figure) the points that no other beats in both, by recall."""
    sign = 1 if smaller_is_better else -1
    kept: list[tuple[float, float]] = []
    for recall, figure in sorted(points, key=lambda one: (-one[0], sign * one[1])):
        if not kept or sign * figure < sign * kept[-1][1]:
            kept.append((recall, figure))
    return kept[::-1]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write the figure of one corpus' report; panels of times only where it has times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    panels = [("cost a query, in scores of the model", True, _costs(report))]
    if report["timing"]:
        panels += [
            ("QPS, every core busy", False, _times(report, "median_qps")),
            ("p99 of one query alone [ms]", True, _times(report, "p99_ms")),
        ]
    names = [entry["name"] for entry in report["contenders"]]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.2 * len(panels), 6), layout="constrained", squeeze=False
    )
    lines: dict[str, Any] = {}
    for axis, (label, smaller_is_better, series) in zip(axes[0], panels, strict=True):
        for place, name in enumerate(names):
            points = front(series.get(name, []), smaller_is_better=smaller_is_better)
            points = [(recall, figure) for recall, figure in points if recall >= _LEAST_RECALL]
            if points:
                x, y = zip(*points, strict=True)
                lines[name] = axis.plot(_spread(x), y, label=name, **_style(name, place))[0]
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.set_ylabel(label)
        axis.set_xticks(_spread(_TICKS), [f"{tick:g}" for tick in _TICKS])
        axis.set_xlabel(f"recall@{report['corpus']['k']} against exhaustive")
        axis.grid(True, which="both", alpha=0.25)
    shown = [lines[name] for name in names if name in lines]
    figure.legend(handles=shown, loc="outside lower center", ncols=min(4, 2 * len(panels)), frameon=False)
    figure.suptitle(f"{report['name']}: {report['corpus']['num_items']:,} items, {report['corpus']['model']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _costs(report: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    return {
        entry["name"]: [(row["recall"]["mean"], row["cost"]["mean"]) for row in entry["reported"]]
        for entry in report["contenders"]
        if not entry["same_counts_as"]  # its line would lie under the other's
    }


def _times(report: Mapping[str, Any], figure: str) -> dict[str, list[tuple[float, float]]]:
    recalls = {
        (entry["name"], row["setting"]): row["recall"]["mean"]
        for entry in report["contenders"]
        for row in entry["reported"]
    }
    series: dict[str, list[tuple[float, float]]] = {}
    for row in report["timing"]["rows"]:
        recall = recalls.get((row["contender"], row["setting"]))
        if recall is not None:
            series.setdefault(row["contender"], []).append((recall, row[figure]))
    return series


def _spread(recalls: Sequence[float]) -> Any:
    """Recall on an axis where each tenth of what is missed takes the same room."""
    return -np.log10(np.maximum(1 - np.asarray(recalls, dtype=float), _MISSED))


def _style(name: str, place: int) -> dict[str, Any]:
    from matplotlib import colormaps

    own = name.startswith(_OWN)
    return {
        "color": colormaps["tab20"]((2 * place % 20 + place // 10) / 20),
        "linestyle": "-" if own else "--",
        "linewidth": 2.2 if own else 1.3,
        "marker": "osD^v<>Pp*Xhd8"[place % 14],
        "markersize": 6,
    }
