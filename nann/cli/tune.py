"""``nann tune``: the search profiles of a run, for a recall or for a latency."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nann.cli.output import JsonOption, emit

__all__ = ["tune_command"]


def tune_command(
    run: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Directory of the run.")],
    recall: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Recall of `balanced`, against the exhaustive search.")
    ] = 0.985,
    fast_recall: Annotated[float, typer.Option(min=0.0, max=1.0, help="Recall of `fast`.")] = 0.95,
    latency_ms: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Instead of --recall: the most recall within this median, one at a time."
        ),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Items answered to each user.")] = 200,
    users: Annotated[int, typer.Option(min=1, help="Validation users to measure on.")] = 300,
    seed: Annotated[int, typer.Option(help="Decides which users are looked at.")] = 0,
    xla_cache_dir: Annotated[Path | None, typer.Option(help="XLA's cache of compiled programs.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose a run's profiles `fast`, `balanced` and `exact` from a measured front of recall and cost."""
    from nann.offline.progress import Progress
    from nann.offline.tuning import Target, tune

    balanced = Target(recall=recall) if latency_ms is None else Target(latency_ms=latency_ms)
    with Progress() as progress:
        report = tune(
            run,
            targets={"fast": Target(recall=fast_recall), "balanced": balanced},
            k=k,
            users=users,
            seed=seed,
            xla_cache_dir=xla_cache_dir,
            progress=progress,
        )
    by_name = {row["name"]: row for row in report["rows"]}
    lines = [f"recall@{report['k']}  scored  estimated  p50 ms  setting (the front by latency)"]
    for name in report["front"]["latency_ms"]:
        row = by_name[name]
        lines.append(
            f"{row['recall']:>10.4f}  {row['items_scored']:>6,.0f}  {row['estimated']:>9,.0f}  "
            f"{row['latency_ms']['p50']:>6.2f}  {name}"
        )
    for name, params in report["profiles"].items():
        text = ", ".join(f"{key} {value}" for key, value in params.items())
        lines.append(f"{name}: {text}" + ("" if report["reached"][name] else " (the target was not reached)"))
    lines.append(f"next: nann evaluate --run {run}, then nann export --run {run} --repository REPOSITORY")
    emit(report, as_json=as_json, words="\n".join(lines))
