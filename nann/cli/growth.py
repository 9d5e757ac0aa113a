"""``python -m nann.cli.growth``: how cost grows with the corpus, from ten thousand items to four million.

Each size is made, indexed, published, measured and deleted; its figures stay in the output directory, so
that the same command goes on where it was interrupted. The largest size needs 20 GB of disk and 12 of memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nann.engine.scoring.native_log import quiet_native_log

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_SIZES = "10000,30000,100000,300000,1000000,4000000"
_BEGIN, _END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
_PICTURE = Path("images") / "growth.svg"


@app.command()
def growth(
    output: Annotated[Path, typer.Option(help="Directory for the figures; sizes in it are not repeated.")],
    sizes: Annotated[str, typer.Option(help="Numbers of items, separated by commas.")] = _SIZES,
    users: Annotated[int, typer.Option(min=1, help="Users to search for.")] = 32,
    ef_construction: Annotated[int, typer.Option(min=1, help="Of every graph.")] = 100,
    seed: Annotated[int, typer.Option(help="Draws the corpora.")] = 0,
    docs: Annotated[
        Path | None, typer.Option(help="Also put the section and the picture into this document.")
    ] = None,
) -> None:
    """Measure search, latency, memory, index, size, mapping and verification at each size."""
    from nann.offline.benchmark.growth.plots import draw
    from nann.offline.benchmark.growth.report import growth_section
    from nann.offline.benchmark.growth.session import Options, measure_sizes, read_results

    try:
        numbers = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{sizes!r} is no list of numbers", param_hint="--sizes") from None
    document = None if docs is None else _split(docs)
    options = Options(users=users, seed=seed, ef_construction=ef_construction)
    measure_sizes(numbers, output, options, lambda line: typer.echo(line, err=True))
    results = read_results(output)
    section = growth_section(results)
    (output / "growth.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (output / "growth.md").write_text(section + "\n", encoding="utf-8")
    draw(results, output / "growth.svg")
    if docs is not None and document is not None:
        before, after = document
        docs.write_text(f"{before}{_BEGIN}{section}\n{_END}{after}", encoding="utf-8")
        draw(results, docs.parent / _PICTURE)
    typer.echo(section)


def _split(docs: Path) -> tuple[str, str]:
    """What stands before and after the measured section. Wrong usage when there is no such section."""
    text = docs.read_text(encoding="utf-8") if docs.is_file() else ""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise typer.BadParameter(f"{docs} has no line {_BEGIN.strip()}", param_hint="--docs")
    return before, after


if __name__ == "__main__":
    quiet_native_log()
    try:
        app(prog_name="python -m nann.cli.growth")
    except (OSError, ValueError) as error:
        typer.echo(f"growth: {error}", err=True)
        sys.exit(1)
