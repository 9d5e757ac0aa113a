"""``python -m nann.cli.reliability``: each subcommand measures one promise and prints its table row.

The rows are those of docs/reliability.md. Everything runs on this machine, over loopback, for a bounded
time; the server is a child process. To add a promise: a subcommand here that ends in `print_row`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nann.cli.output import JsonOption
from nann.cli.reliability.drain import drain_command
from nann.cli.reliability.equal_answers import equal_answers_command
from nann.cli.reliability.overhead import overhead_command
from nann.cli.reliability.overload import overload_command
from nann.cli.reliability.row import print_row
from nann.cli.reliability.soak import soak_command
from nann.cli.reliability.throughput import ceiling_command, throughput_command

__all__ = ["app"]

app = typer.Typer(
    help="Measure what docs/reliability.md promises; one table row a subcommand.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _one_of_several() -> None:
    """Measure what docs/reliability.md promises; one table row a subcommand."""


Repository = Annotated[Path, typer.Option(help="A model repository; nothing is written into it.")]
Model = Annotated[str | None, typer.Option(help="Its model, where it has several.")]


@app.command()
def swap(
    repository: Repository,
    model: Model = None,
    other: Annotated[
        Path | None,
        typer.Option(help="A version of another architecture, to swap in last: one that compiles."),
    ] = None,
    swaps: Annotated[int, typer.Option(min=1, help="Versions swapped in a row.")] = 20,
    share: Annotated[float, typer.Option(min=0.01, max=1.0, help="Load, as a share of the capacity.")] = 0.4,
    max_batch_size: Annotated[int, typer.Option(min=1, help="--max-batch-size of the server.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of users and arrivals.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Hot swaps under load: failures, answers that mix versions, and latency during swaps."""
    from nann.cli.reliability.swap import measure_swaps

    flags = ["--max-batch-size", str(max_batch_size)]
    result = measure_swaps(repository, model, other=other, swaps=swaps, share=share, flags=flags, seed=seed)
    print_row(
        f"{swaps} swaps in a row at {share:.0%} of capacity, programs compiled: no failed request, no "
        "answer mixing versions, p99 during swaps ≤ 2 × steady",
        result.words(),
        kept=result.kept,
        as_json=as_json,
    )


@app.command()
def server_kill(
    repository: Repository,
    store: Annotated[
        str, typer.Option(help="The user store: sqlite, or redis, a server of its own.")
    ] = "sqlite",
    kills: Annotated[int, typer.Option(min=1, help="Servers killed under load.")] = 10,
    writers: Annotated[
        int, typer.Option(min=1, help="Clients that each record one event after another.")
    ] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time from the first event to the kill.")] = 3.0,
    as_json: JsonOption = False,
) -> None:
    """``kill -9`` of the server under a stream of events: none that was acknowledged may be lost."""
    from nann.cli.reliability.histories import measure_kills

    result = measure_kills(repository, store=store, kills=kills, writers=writers, seconds=seconds)
    print_row(
        f"`kill -9` of the server loses no acknowledged event ({store}, {writers} writers, {kills} kills)",
        result.words(),
        kept=result.kept,
        as_json=as_json,
    )


@app.command()
def redis_outage(
    repository: Repository,
    rate: Annotated[float, typer.Option(min=1, help="Queries a second; half with a history.")] = 40.0,
    seconds: Annotated[float, typer.Option(min=1, help="Length of each part: before, outage, after.")] = 10.0,
    failure: Annotated[str, typer.Option(help="--user-store-failure of the server.")] = "base",
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """``kill -9`` of Redis under load, and its return."""
    from nann.cli.reliability.histories import measure_outage

    result = measure_outage(repository, rate_qps=rate, seconds=seconds, failure=failure, seed=seed)
    answer = "are answered from the model's own history and say so" if failure == "base" else "get 503"
    print_row(
        f"`kill -9` of Redis: `history` queries go on, `user_id` ones {answer}; all recover by themselves",
        result.words(),
        kept=result.kept,
        as_json=as_json,
    )


@app.command()
def fuzz(
    repository: Repository,
    requests: Annotated[int, typer.Option(min=1, help="Inputs sent in all.")] = 100_000,
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Hostile requests over REST and gRPC, and TensorProto decoding."""
    from nann.cli.reliability.fuzz import measure_fuzz

    result = measure_fuzz(repository, requests=requests, seed=seed)
    print_row(
        f"{requests:,} fuzzed requests over REST (from the server's own OpenAPI), gRPC and TensorProto "
        "decoding: no 500, INTERNAL or UNKNOWN, no crash, no hang",
        result.words(),
        kept=result.kept,
        as_json=as_json,
    )


@app.command()
def artifacts(
    repository: Repository,
    model: Model = None,
    versions: Annotated[int, typer.Option(min=1, help="Damaged versions offered.")] = 1_000,
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Damaged versions offered to a server that serves."""
    from nann.cli.reliability.artifacts import measure_damage

    result = measure_damage(repository, model, versions=versions, seed=seed)
    print_row(
        f"{versions:,} mutated artifacts: each refused cleanly, the old version still serving",
        result.words(),
        kept=result.kept,
        as_json=as_json,
    )


@app.command()
def service_links(repository: Repository, model: Model = None, as_json: JsonOption = False) -> None:
    """Kubernetes' service-link variables and a misspelt setting."""
    from nann.cli.reliability.environment import measure_environment

    result = measure_environment(repository, model)
    print_row(
        "The server starts in a pod that has service-link variables, and refuses a misspelt `NANN_` variable",
        result.words(),
        kept=result.kept,
        as_json=as_json,
    )


app.command("overload")(overload_command)
app.command("drain")(drain_command)
app.command("overhead")(overhead_command)
app.command("throughput")(throughput_command)
app.command("ceiling")(ceiling_command)
app.command("soak")(soak_command)
app.command("equal-answers")(equal_answers_command)
