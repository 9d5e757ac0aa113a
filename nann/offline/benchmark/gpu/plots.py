"""The report's picture, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["draw"]


def draw(report: Mapping[str, Any], directory: Path) -> list[Path]:
    """Recall over items scored, and over QPS, of every setting; the files, none without matplotlib."""
    steps = report["steps"]
    series = {
        "best_first": [row for row in _rows(steps, "settings") if row["name"].startswith("best_first")],
        "level (NANN's)": [row for row in _rows(steps, "settings") if row["name"].startswith("level")],
        "inner product + rerank": _rows(steps, "rivals"),
    }
    if find_spec("matplotlib") is None or not any(series.values()):
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for panel, key, label in zip(
        panels, ("mean_items_scored", "qps"), ("items scored a query", "QPS, one lane"), strict=True
    ):
        for name, rows in series.items():
            ordered = sorted(rows, key=lambda row: row[key])
            panel.plot([row[key] for row in ordered], [row["recall"] for row in ordered], "o-", label=name)
        panel.set_xscale("log")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("recall@200")
    panels[0].legend()
    figure.suptitle(f"{report['items']:,} items on {report['device']}")
    path = directory / "recall.svg"
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
    return [path]


def _rows(steps: Mapping[str, Any], name: str) -> list[Any]:
    return list(steps.get(name, {}).get("figures", {}).get("rows", []))
