"""The ``nann`` command. Importing it, or asking for help, loads neither TensorFlow nor a server.

Exit codes: 0 success, 2 wrong usage, 1 failure with one line that says what to do.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from nann.cli.artifact import export_command, extract_command, index_command
from nann.cli.benchmark import benchmark_command
from nann.cli.compare import compare_command
from nann.cli.demo import demo_command
from nann.cli.distill import distill_command
from nann.cli.evaluate import evaluate_command
from nann.cli.pipeline import pipeline_command
from nann.cli.prepare import prepare_command
from nann.cli.query import query_command
from nann.cli.serve import serve_command
from nann.cli.train import train_command
from nann.cli.tune import tune_command
from nann.engine.scoring.native_log import quiet_native_log

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="nann",
    help="Retrieval with the deep model itself as the similarity: from a click log to a running service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(metadata.version("nann"))
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the whole traceback of a failure.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Retrieval with the deep model itself as the similarity: from a click log to a running service."""


app.command("prepare")(prepare_command)
app.command("train")(train_command)
app.command("extract")(extract_command)
app.command("index")(index_command)
app.command("distill")(distill_command)
app.command("tune")(tune_command)
app.command("evaluate")(evaluate_command)
app.command("export")(export_command)
app.command("serve")(serve_command)
app.command("query")(query_command)
app.command("benchmark")(benchmark_command)
app.command("compare")(compare_command)
app.command("pipeline")(pipeline_command)
app.command("demo")(demo_command)


# It also runs where Typer is not installed (`python -m nann.cli.gpu_report`), so it reads its own flags.
_ITS_OWN_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("gpu-report", context_settings=_ITS_OWN_FLAGS)
def _gpu_report(context: typer.Context) -> None:
    """Measure the engine on a GPU, over a corpus of its own making, and write what was found."""
    from nann.cli.gpu_report import main as gpu_report

    raise typer.Exit(gpu_report(context.args))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    # Before the parser, because it also decides how the parser's own failures are shown.
    debug = bool(arguments) and arguments[0] == "--debug"
    try:
        app(list(arguments), prog_name="nann")
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where it can")
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(_in_one_line(error, arguments))
    return 0


def main() -> None:
    """Entry point of the ``nann`` script."""
    quiet_native_log()
    sys.exit(run(sys.argv[1:]))


def _fail(line: str) -> int:
    typer.echo(f"nann: {line}", err=True)
    return 1


def _in_one_line(error: Exception, arguments: Sequence[str]) -> str:
    text = " ".join(str(error).split())
    ours = type(error).__module__.startswith("nann.")
    if text and (ours or isinstance(error, OSError | ValueError)):
        return text
    command = " ".join(argument for argument in arguments if argument != "--debug")
    return f"unexpected {type(error).__name__}: {text or 'no message'}; to see where: nann --debug {command}"


if __name__ == "__main__":
    main()
