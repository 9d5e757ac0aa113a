"""``nann compare``: every way to retrieve the same items, side by side, into one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nann.cli.output import JsonOption, emit

if TYPE_CHECKING:
    from nann.offline.benchmark.compare.contender import Skipped
    from nann.offline.progress import Progress

__all__ = ["compare_command"]


def compare_command(
    corpus: Annotated[
        list[str],
        typer.Option(help="NAME of a corpus that is made here, or NAME=RUN for a run; repeat for several."),
    ],
    work: Annotated[Path, typer.Option(help="Directory for runs, indexes and what was measured.")],
    data: Annotated[Path, typer.Option(help="Directory of the click logs that NAME stands for.")] = Path(
        "../shared/data"
    ),
    docs: Annotated[
        Path | None, typer.Option(help="The page, with its plots beside it; by default in --work.")
    ] = None,
    timing: Annotated[
        bool, typer.Option("--timing/--no-timing", help="Take times too: wants an idle machine.")
    ] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the contenders take turns.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="Single requests of a setting in a round.")] = 100,
    timed_points: Annotated[
        int, typer.Option(min=0, help="Settings of a contender that are timed beside those chosen.")
    ] = 4,
    tune_users: Annotated[int, typer.Option(min=1, help="Validation users who choose the settings.")] = 300,
    report_users: Annotated[int, typer.Option(min=1, help="Test users of the figures.")] = 1000,
    k: Annotated[int, typer.Option(min=1, help="Items answered to each user.")] = 200,
    lanes: Annotated[int, typer.Option(min=1, help="Searches that run at a time.")] = 2,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Contenders whose names begin so; repeat for several. By default all."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare this engine, NANN's search and the usual indexes on the same model, corpus and users.

    What was counted is kept in --work and not counted again. The corpora that are made here: synthetic,
    ml-1m, brunch-small, brunch-small-fgsm, brunch, synthetic-1.3m.
    """
    from nann.offline.benchmark.compare.contender import Skipped
    from nann.offline.benchmark.compare.corpus import CorpusOptions
    from nann.offline.benchmark.compare.loops import TimingBudget
    from nann.offline.benchmark.compare.plots import draw
    from nann.offline.benchmark.compare.report import page
    from nann.offline.benchmark.compare.run import CompareOptions, compare
    from nann.offline.progress import Progress

    options = CompareOptions(
        corpus=CorpusOptions(k=k, n_tune=tune_users, n_report=report_users, lanes=lanes),
        timing=timing,
        timed_points=timed_points,
        rounds=rounds,
        budget=TimingBudget(requests=requests),
        only=tuple(only or ()),
    )
    target = work / "benchmarks.md" if docs is None else docs
    reports: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    with Progress() as progress:
        for one in corpus:
            name, _, run = one.partition("=")
            found = _run(name, Path(run) if run else None, data, work, progress)
            if isinstance(found, Skipped):
                progress.line(f"{name} is left out: {found.reason}")
                skipped.append(found)
                continue
            run_dir, version = found
            reports.append(
                compare(
                    name,
                    run_dir,
                    version,
                    work / name / "compare",
                    scann=work / "scann-environment",
                    options=options,
                    progress=progress,
                )
            )
            draw(reports[-1], target.parent / "benchmarks" / f"{name}.png")
            target.write_text(page([*reports, *_earlier(work, reports)], skipped), encoding="utf-8")
    emit(
        {"corpora": reports, "skipped": skipped},
        as_json=as_json,
        words=f"{target} is written" if reports else "nothing was compared",
    )


def _earlier(work: Path, reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What earlier runs have measured in `work` of other corpora."""
    new = {report["name"] for report in reports}
    paths = sorted(work.glob("*/compare/report.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [report for report in found if report["name"] not in new]


def _run(
    name: str, run: Path | None, data: Path, work: Path, progress: Progress
) -> tuple[Path, Path] | Skipped:
    """The directory of a corpus' run, and the version that is searched."""
    from nann.cli.benchmark_engine import find_version
    from nann.offline.benchmark.compare.contender import Skipped
    from nann.offline.benchmark.compare.recipes import RECIPES, made_run

    if run is not None:
        repository = run / "repository"
        return run, find_version(repository if repository.is_dir() else run, None)
    if name not in RECIPES:
        raise typer.BadParameter(f"--corpus {name}: give {name}=RUN, or one of {', '.join(RECIPES)}")
    run_dir = work / name / "run"
    version = made_run(name, data, run_dir, progress)
    return version if isinstance(version, Skipped) else (run_dir, version)
