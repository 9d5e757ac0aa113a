"""The evaluation report a person reads: report.md, and a plot of recall against items scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["nann_block", "write_report"]

PLOT = Path("plots") / "recall_vs_items_scored.png"


def nann_block(row: Mapping[str, Any], k: int) -> str:
    """One search's figures in the words NANN prints: precision, recall and F1 at k, items scored."""
    return (
        f"precision@{k}: {row['precision']:.6f}, recall@{k}: {row['recall_held_out']:.6f}, "
        f"f1@{k}: {row['f1']:.6f}, mean items scored: {row['items_scored']:.1f}"
    )


def write_report(run_dir: Path, report: Mapping[str, Any]) -> None:
    """Write report.md and its plot into `run_dir`."""
    plotted = run_dir / PLOT
    plotted.parent.mkdir(exist_ok=True)
    _plot(plotted, report)
    (run_dir / "report.md").write_text(_markdown(report), encoding="utf-8")


def _markdown(report: Mapping[str, Any]) -> str:
    k, served, exact = report["k"], report["served"], report["exhaustive"]
    lines = [
        "# Evaluation",
        "",
        f"{report['num_items']:,} items, model `{report['model']}`, {report['n_test_users']:,} test users; "
        f"settings were chosen on {report['n_tune_users']:,} validation users. "
        "Nothing is excluded from answers.",
        "",
        f'hit_rate@{k}: the held-out item is among the {k} answered ("recall" in NANN\'s paper). '
        f"recall@{k}: the share of the exhaustive top {k} under the same model that is answered, by score "
        '("coverage" there).',
        "",
        "## Does it find what users chose next?",
        "",
        _table(
            ["", f"hit_rate@{k}", "95 % interval", f"NDCG@{k}"],
            [
                [
                    f"served ({served['name']})",
                    _percent(served["hit_rate"]),
                    _interval(served, "hit_rate"),
                    f"{served['ndcg']:.4f}",
                ],
                [
                    "exhaustive, same model",
                    _percent(exact["hit_rate"]),
                    _interval(exact, "hit_rate"),
                    f"{exact['ndcg']:.4f}",
                ],
                *[
                    [
                        row["name"],
                        _percent(row["metrics"]["hit_rate"]),
                        f"{_percent(row['hit_rate']['low'])} – {_percent(row['hit_rate']['high'])}",
                        f"{row['metrics']['ndcg']:.4f}",
                    ]
                    for row in report["baselines"]
                ],
            ],
        ),
        "",
        "As NANN prints it:",
        "",
        f"    served      {nann_block(served, k)}",
        f"    exhaustive  {nann_block(exact, k)}",
        "",
        "## What does it cost?",
        "",
        _sweep(report["sweep"], k),
        "",
        f"![recall against items scored]({PLOT.as_posix()})",
        "",
        "## Profiles",
        "",
        _table(
            ["profile", "parameters", "its recall target"],
            [
                [
                    name,
                    ", ".join(f"{key} {value}" for key, value in params.items()),
                    "reached" if report["profiles_reached"][name] else "**not reached**: the best there is",
                ]
                for name, params in report["profiles"].items()
            ],
        ),
        "",
        "## Items scored step by step (mean)",
        "",
        *[
            f"- {row['name']}: " + ", ".join(f"{count:.0f}" for count in row["scored_per_step"])
            for row in report["sweep"]
        ],
        "",
    ]
    return "\n".join(lines)


def _sweep(rows: Sequence[Mapping[str, Any]], k: int) -> str:
    return _table(
        [
            "search",
            f"recall@{k}",
            "5th percentile",
            f"hit_rate@{k}",
            "items scored",
            "of corpus",
            "p50 ms",
            "p99 ms",
        ],
        [
            [
                row["name"],
                f"{row['recall']:.4f}",
                f"{row['recall_p5']:.3f}",
                _percent(row["hit_rate"]),
                f"{row['items_scored']:,.0f}",
                _percent(row["share_scored"]),
                f"{row['latency_ms']['p50']:.1f}",
                f"{row['latency_ms']['p99']:.1f}",
            ]
            for row in rows
        ],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _interval(row: Mapping[str, Any], name: str) -> str:
    return f"{_percent(row[name + '_low'])} – {_percent(row[name + '_high'])}"


def _plot(path: Path, report: Mapping[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for policy, label, marker in (
        ("best_first", "best_first (from the user)", "o"),
        ("level", "level (NANN's served search)", "s"),
    ):
        rows = sorted(
            (row for row in report["sweep"] if row["policy"] == policy), key=lambda row: row["items_scored"]
        )
        axes.plot(
            [row["items_scored"] for row in rows], [row["recall"] for row in rows], marker=marker, label=label
        )
    axes.set_xscale("log")
    axes.set_xlabel(f"items scored per query (of {report['num_items']:,})")
    axes.set_ylabel(f"recall@{report['k']} against exhaustive")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
