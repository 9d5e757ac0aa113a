"""``nann evaluate``, and the flags of the evaluation that other commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nann.cli.output import JsonOption, emit
from nann.cli.parameters import Flag, given, with_flags

__all__ = ["EVALUATE_FLAGS", "evaluate_command"]

# Fields of nann.offline.evaluate.EvaluateOptions; a test compares.
EVALUATE_FLAGS = (
    Flag("k", int, "Items answered to each user."),
    Flag("n_tune", int, "Validation users on whom the search profiles are chosen."),
    Flag("n_report", int, "Test users that the report is about."),
    Flag("lanes", int, "Searches that run at a time."),
    Flag("baselines", bool, "Measure popularity, random and item-kNN beside it."),
    Flag("xla_cache_dir", Path, "XLA's cache of compiled programs; makes the next start faster."),
)


@with_flags((*EVALUATE_FLAGS, Flag("seed", int, "Decides which users are looked at.")))
def evaluate_command(
    run: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Directory of the run.")],
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Score every item for every user (NANN's test_all).")
    ] = False,
    query_form: Annotated[
        Literal["history", "comm_seq"],
        typer.Option(help="comm_seq: ask with embedded histories, as NANN's clients do."),
    ] = "history",
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Measure a run's index with the engine that serves; write report.md, report.json and plots."""
    from nann.offline.evaluate import EvaluateOptions, evaluate
    from nann.offline.progress import Progress

    with Progress() as progress:
        report = evaluate(
            run,
            options=EvaluateOptions(**given(options)),
            exhaustive=exhaustive,
            query_form=query_form,
            progress=progress,
        )
    from nann.offline.report import nann_block

    k = report["k"]
    lines = [f"exhaustive  {nann_block(report['exhaustive'], k)}"]
    if query_form == "comm_seq" and not exhaustive:
        lines += [
            f"{row['name']}: recall@{k} {row['recall']:.4f}, {row['items_scored']:,.0f} items scored"
            for row in report["sweep"]
        ]
    elif not exhaustive:
        served = report["served"]
        lines = [
            f"served      {nann_block(served, k)}",
            *lines,
            f"recall@{k} against exhaustive (coverage) {served['recall']:.4f} at "
            f"{100 * served['share_scored']:.2f} % of the corpus; more in {run / 'report.md'}",
        ]
    emit(report, as_json=as_json, words="\n".join(lines))
