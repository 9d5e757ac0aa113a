"""``nann distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nann.cli.output import JsonOption, emit
from nann.cli.parameters import Flag, given, with_flags

__all__ = ["DISTILL_FLAGS", "distill_command"]

# The fields of nann.offline.distill.DistillOptions, whose import would load TensorFlow; a test compares.
DISTILL_FLAGS = (
    Flag("answers", int, "Training users whose answers the graph learns from; by default all up to 15,000."),
    Flag("users", int, "Histories of training users to learn from; follows the corpus (300 to 2,000)."),
    Flag("steps", int, "Training steps; follows the corpus (300 to 1,500)."),
    Flag("held_out_users", int, "Histories of other training users, on whom the error is measured."),
    Flag("dim", int, "Numbers of an item's key and query. More estimates better, costs time and memory."),
    Flag("context_dim", int, "Numbers that sum up the whole history; 0: none."),
    Flag("residual_weight", float, "Share of the error at an item that its neighbours are corrected by."),
    Flag("lanes", int, "Searches that run at a time; by default one a processor."),
    Flag("seed", int, "Decides users, weights and samples."),
    Flag("xla_cache_dir", Path, "XLA's cache of compiled programs; makes the next start faster."),
)


@with_flags(DISTILL_FLAGS)
def distill_command(
    run: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Directory of the run.")],
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Teach a run's index to estimate scores, so that a search need not score every item it meets."""
    from nann.offline.distill import DistillOptions, distill
    from nann.offline.progress import Progress

    with Progress() as progress:
        report = distill(run, options=DistillOptions(**given(options)), progress=progress)
    quality = report.quality
    emit(
        report,
        as_json=as_json,
        words=f"{report.index}: links and starts from {report.answers:,} answers, "
        f"{report.table_bytes / 1e6:.1f} MB of tables from {report.users:,} users; on "
        f"{quality.users} others the estimate is off by {quality.rmse:.2f} (scores spread by "
        f"{quality.spread:.2f}), {100 * quality.coverage:.0f} % of their best 200 items are in its best "
        f"1,000; asking {report.teacher_s:.0f} s, training {report.training_s:.0f} s",
    )
