"""``nann pipeline``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nann.cli.artifact import GRAPH_FLAGS, graph_options
from nann.cli.evaluate import EVALUATE_FLAGS
from nann.cli.output import JsonOption, emit, table
from nann.cli.parameters import given, with_flags
from nann.cli.prepare import (
    AttributesOption,
    CategoryColumn,
    ItemColumn,
    ItemTable,
    StrictOption,
    TimeColumn,
    UserColumn,
    column_mapping,
)
from nann.cli.train import TRAIN_FLAGS

__all__ = ["pipeline_command"]


@with_flags((*TRAIN_FLAGS, *GRAPH_FLAGS, *EVALUATE_FLAGS))
def pipeline_command(
    input: Annotated[Path, typer.Option(exists=True, help="The click log: a file or a directory.")],
    output: Annotated[Path, typer.Option(help="Directory of the run.")],
    name: Annotated[str, typer.Option(help="The model's name in the repository.")] = "nann",
    strict: StrictOption = False,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    time_column: TimeColumn = None,
    category_column: CategoryColumn = None,
    attribute: AttributesOption = None,
    items: ItemTable = None,
    as_json: JsonOption = False,
    **flags: Any,
) -> None:
    """Run all offline steps, skipping those already done.

    --output/repository is then ready to serve, --output/report.md says how good it is. --seed decides
    the held-out users, both trainings and the users looked at.
    """
    from nann.offline.pipeline import PipelineOptions, run_pipeline
    from nann.offline.progress import Progress

    chosen = given(flags)
    seed = {"seed": chosen["seed"]} if "seed" in chosen else {}
    columns = column_mapping(user_column, item_column, time_column, category_column, attribute)
    prepare = {**seed, "strict": strict or None, "columns": columns, "item_attributes": items}
    options = PipelineOptions(
        name=name,
        prepare=given(prepare),
        train={flag.name: chosen[flag.name] for flag in TRAIN_FLAGS if flag.name in chosen},
        graph=graph_options({flag.name: chosen.get(flag.name) for flag in GRAPH_FLAGS}),
        distill=seed,
        evaluate={**seed, **{f.name: chosen[f.name] for f in EVALUATE_FLAGS if f.name in chosen}},
    )
    with Progress() as progress:
        report = run_pipeline(input, output, options=options, progress=progress)
    words = table(
        f"{report.version_dir} is published, {report.report} says how good it is",
        ["step", "", "s"],
        [[s.name, "skipped" if s.skipped else "done", f"{s.seconds:.1f}"] for s in report.steps],
    )
    emit(report, as_json=as_json, words=words)
