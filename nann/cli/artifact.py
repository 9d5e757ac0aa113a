"""``nann extract``, ``nann index`` and ``nann export``: from a trained model to a published version."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nann.cli.output import JsonOption, emit
from nann.cli.parameters import Flag, given, with_flags

__all__ = ["GRAPH_FLAGS", "export_command", "extract_command", "graph_options", "index_command"]

# The fields of nann.offline.build_index.GraphOptions; a test compares.
GRAPH_FLAGS = (
    Flag("preset", Literal["default", "nann"], "nann: the graph that NANN publishes (M 32, 40, L2)."),
    Flag("m", int, "Links of an item (twice as many on the ground level). More finds more, costs memory."),
    Flag("ef_construction", int, "Width of the search for links. More finds better ones, builds slower."),
    Flag("space", Literal["cosine", "l2", "ip"], "What near means between item embeddings."),
    Flag("nearest", int, "Link each item to so many nearest ones, and back. 0: HNSW's own links."),
    Flag("repair", bool, "Link items that no search would find."),
    Flag("graph_seed", int, "Decides the items' levels."),
)


def graph_options(values: dict[str, Any]) -> Any:
    """`GraphOptions` of the preset, with the flags that were given in place of its values."""
    from dataclasses import replace

    from nann.offline.build_index import PRESETS

    chosen = given({"seed" if name == "graph_seed" else name: value for name, value in values.items()})
    preset = PRESETS[chosen.pop("preset", "default")]
    return replace(preset, **chosen)


def extract_command(
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Output of nann train.")],
    output: Annotated[Path, typer.Option(help="Directory of the embeddings and the SavedModel.")],
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="The data set, where it is no longer at its place."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write item_ids, item_embs and all of the artifact that comes from model and data."""
    from nann.offline.extract_embeddings import extract
    from nann.offline.progress import Progress

    report = extract(model, output, data, progress=Progress())
    emit(
        report,
        as_json=as_json,
        words=f"{output}: {report.num_items:,} items × {report.embedding_dim}; "
        f"next: nann index --embeddings {output} --output INDEX",
    )


@with_flags(GRAPH_FLAGS)
def index_command(
    embeddings: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Output of nann extract, or NANN's arrays.")
    ],
    output: Annotated[Path, typer.Option(help="Directory of the index.")],
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; the graph is the same.")] = None,
    as_json: JsonOption = False,
    **graph: Any,
) -> None:
    """Build the graph over the item embeddings."""
    from nann.offline.build_index import build_index
    from nann.offline.progress import Progress

    with Progress() as progress:
        report = build_index(
            embeddings, output, options=graph_options(graph), num_threads=threads, progress=progress
        )
    lost = report.graph["unreachable_before_repair"]
    emit(
        report,
        as_json=as_json,
        words=f"{output}: {report.num_items:,} items in {report.build_s:.1f} s; unreachable before repair "
        f"{max(lost.values()):,}, after it {max(report.graph['unreachable'].values()):,}",
    )


def export_command(
    run: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Directory of the run.")],
    repository: Annotated[Path, typer.Option(help="Model repository.")],
    name: Annotated[str, typer.Option(help="The model's name there.")] = "nann",
    version: Annotated[int | None, typer.Option(min=1, help="By default the next one.")] = None,
    format: Annotated[
        Literal["nann", "tf-serving"],
        typer.Option(help="tf-serving: the SavedModel also holds NANN's search, for TensorFlow Serving."),
    ] = "nann",
    programs: Annotated[
        Literal["cpu,gpu", "cpu", "gpu", "none"],
        typer.Option(help="XLA programs for serving without TensorFlow: a few seconds and 0.25 MB a set."),
    ] = "cpu,gpu",
    programs_max_batch: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Most queries a batch in them; by default 16 (cpu), 64 (gpu)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a run's index as the next version of a model."""
    from nann.offline.export import ALL_PROGRAM_SETS, export
    from nann.offline.progress import Progress

    path = export(
        run,
        repository,
        name,
        version,
        format=format,
        programs=[name for name in ALL_PROGRAM_SETS if name in programs.split(",")],
        max_batch=programs_max_batch,
        progress=Progress(),
    )
    emit(
        {"path": path, "model": name, "version": int(path.name)},
        as_json=as_json,
        words=f"{path} is published; next: nann serve --repository {repository}",
    )
