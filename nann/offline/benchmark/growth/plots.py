"""The growth of search, recall, time to load and size over the corpus, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw"]


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the picture (SVG); the same results give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "nann"}):
        figure, axes = pyplot.subplots(2, 2, figsize=(11, 8))
        sizes = [one["items"] for one in results]
        (scored, recall), (seconds, gigabytes) = axes
        for position, search in enumerate(results[0]["searching"]["searches"]):
            rows = [one["searching"]["searches"][position] for one in results]
            label = f"ef {search['ef']}"
            scored.plot(sizes, [row["items_scored"] for row in rows], "o-", label=label)
            recall.plot(sizes, [row["recall"] for row in rows], "o-", label=label)
        scored.plot(sizes, sizes, "k:", label="exhaustive")
        recall.set_ylim(top=1.005)
        for name, label in (("fast_warm", "map, fast"), ("full_warm", "map, full verification")):
            seconds.plot(sizes, [one["opening"][name]["wall_s"] for one in results], "o-", label=label)
        seconds.plot(sizes, [one["searching"]["load_s"] for one in results], "o-", label="load, fast")
        seconds.plot(sizes, [one["build"]["index_cpu_s"] for one in results], "o-", label="index, CPU")
        gigabytes.plot(
            sizes, [sum(one["build"]["bytes"].values()) / 1e9 for one in results], "o-", label="artifact"
        )
        gigabytes.plot(
            sizes,
            [one["searching"]["searched"]["anonymous_bytes"] / 1e9 for one in results],
            "o-",
            label="memory in use",
        )
        titles = ("items scored a query", "recall@200", "seconds", "GB")
        for panel, title in zip(axes.flat, titles, strict=True):
            panel.set_title(title)
            panel.set_xscale("log")
            panel.set_xlabel("items")
            panel.grid(alpha=0.3)
            panel.legend()
        for panel in (scored, seconds, gigabytes):
            panel.set_yscale("log")
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
