"""``nann benchmark``: load on a server or on an engine in this process, and the engine's own overhead."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nann.cli.credentials import CREDENTIAL_FLAGS, Credentials, credentials_of
from nann.cli.output import JsonOption, emit
from nann.cli.parameters import Flag, given, with_flags

if TYPE_CHECKING:
    from nann.cli.benchmark_targets import Ask
    from nann.offline.benchmark.load import Load, Target
    from nann.offline.benchmark.run import LoadResult
    from nann.offline.benchmark.users import User
    from nann.offline.progress import Progress

__all__ = ["BenchmarkFailed", "benchmark_command"]

# NANN's own width of comm_seq (50 positions of 64 numbers), for a server whose artifact is not at hand.
_NANN_COMM_SEQ_WIDTH = 50 * 64
_DEFAULT_IN_FLIGHT = (1, 16)

_PARAM_FLAGS = (
    Flag(
        "policy",
        Literal["best_first", "level", "level_pruned", "inner_product", "exhaustive"],
        "How to search.",
    ),
    Flag("ef", int, "best_first: best items kept while searching."),
    Flag("beam_width", int, "best_first: items whose neighbours are scored in one step."),
    Flag("max_steps", int, "best_first: at most so many steps."),
    Flag("gate_width", int, "best_first: at most so many items scored a step; 0: without the gate."),
    Flag("gate_margin", float, "best_first: how far below the answer an estimate may lie, in its errors."),
    Flag("level_topn", str, "level: NANN's six widths t0,…,t5."),
)
# Settings of the server that an engine in this process takes; the others come from the environment.
_ENGINE_FLAGS = (
    Flag("lanes", int, "In process: searches at a time."),
    Flag("max_batch_size", int, "In process: queries that share one search at most."),
    Flag("batch_wait_ms", float, "In process: how long a batch that is not full is held."),
    Flag("intra_op_threads", int, "In process: threads one search may use in the model."),
    Flag("queue_limit", int, "In process: queries that may wait."),
    Flag("verify", Literal["full", "fast"], "In process: check of the version at load."),
)


class BenchmarkFailed(Exception):
    """The first request already failed, so there is nothing to measure."""


@with_flags((*_PARAM_FLAGS, *_ENGINE_FLAGS, *CREDENTIAL_FLAGS))
def benchmark_command(
    url: Annotated[
        str | None, typer.Option(help="Server to load: http(s)://HOST:PORT or grpc(s)://HOST:PORT.")
    ] = None,
    repository: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Model repository, version or run directory: searched in process, or, with --url, "
            "whose users are asked for.",
        ),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help='Users to ask for: lines of {"history": […]}.'),
    ] = None,
    model: Annotated[str | None, typer.Option(help="By default the only one.")] = None,
    in_flight: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Closed loop with so many requests in flight; repeat for several."),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Open loop with so many requests a second, at random; repeat for several."),
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds of one round of one load.")] = 10.0,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests of a round, not a duration.")] = None,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds before each that are not measured.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the loads alternate in each.")] = 3,
    users: Annotated[int, typer.Option(min=1, help="Users to draw from the artifact.")] = 1000,
    by_user_id: Annotated[bool, typer.Option("--by-user-id", help="Send user ids, not histories.")] = False,
    seed: Annotated[int, typer.Option(help="Draws the users and the arrivals.")] = 0,
    k: Annotated[int | None, typer.Option(min=1, help="Items wanted; by default 200.")] = None,
    profile: Annotated[str | None, typer.Option(help="fast, balanced or exact.")] = None,
    exclude_seen: Annotated[
        bool | None, typer.Option("--exclude-seen/--include-seen", help="By default the server's setting.")
    ] = None,
    with_attributes: Annotated[
        bool, typer.Option("--with-attributes", help="Answers carry the items' attributes.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 30.0,
    predict: Annotated[
        bool, typer.Option("--predict", help="gRPC: TF Serving's Predict with NANN's inputs (noise).")
    ] = False,
    overhead: Annotated[
        bool, typer.Option("--overhead", help="A search's time against its scoring calls alone.")
    ] = False,
    searches: Annotated[int, typer.Option(min=1, help="--overhead: searches of a round.")] = 16,
    as_json: JsonOption = False,
    **flags: Any,
) -> None:
    """Measure throughput and latency of a server (--url) or of an engine in this process (--repository)."""
    from nann.cli.benchmark_targets import Ask

    if url is None and repository is None:
        raise typer.BadParameter("give --url, --repository or both")
    _check_url(url, predict=predict)
    credentials = credentials_of(flags, url)
    params = given({flag.name: flags[flag.name] for flag in _PARAM_FLAGS})
    if "level_topn" in params:
        params["level_topn"] = _widths(params["level_topn"])
    engine_flags = given({flag.name: flags[flag.name] for flag in _ENGINE_FLAGS})
    if url is not None and engine_flags:
        raise typer.BadParameter(f"--{next(iter(engine_flags)).replace('_', '-')} is for a run in process")
    ask = Ask(k, model, profile, params or None, exclude_seen, by_user_id, with_attributes)
    if overhead:
        if url is not None or repository is None:
            raise typer.BadParameter("--overhead measures in process: give --repository and no --url")
        from nann.cli.benchmark_overhead import print_overhead

        print_overhead(
            repository,
            ask,
            engine_flags,
            users=users,
            seed=seed,
            rounds=rounds,
            searches=searches,
            as_json=as_json,
        )
        return
    loads = _loads(in_flight or [], rate or [], warm_up, duration, requests)
    workload = {"url": url, "users": users, "seed": seed, **given(asdict(ask))}
    if predict:
        assert url is not None
        target = _predict(url, ask, repository, users, seed, timeout, credentials)
    elif url is not None:
        target = _remote(url, ask, _users(repository, queries, model, users, seed), timeout, credentials)
    else:
        assert repository is not None
        target, settings = _local(repository, queries, ask, engine_flags, users, seed, timeout)
        workload |= settings
    _measure(target, loads, rounds, seed, workload, as_json=as_json)


# Reading the flags


def _check_url(url: str | None, *, predict: bool) -> None:
    if url is not None and not url.startswith(("http://", "https://", "grpc://", "grpcs://")):
        raise typer.BadParameter(f"--url should be http(s)://HOST:PORT or grpc(s)://HOST:PORT, not {url!r}")
    if predict and (url is None or not url.startswith("grpc")):
        raise typer.BadParameter("--predict needs --url grpc://HOST:PORT")


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--level-topn should be six numbers with commas, not {text!r}") from None


def _loads(
    in_flight: Sequence[int],
    rates: Sequence[float],
    warm_up_s: float,
    duration_s: float,
    requests: int | None,
) -> list[Load]:
    from nann.offline.benchmark.load import Load

    if not in_flight and not rates:
        in_flight = _DEFAULT_IN_FLIGHT
    shared: dict[str, Any] = {"warm_up_s": warm_up_s, "duration_s": duration_s, "requests": requests}
    try:
        return [
            *(Load(in_flight=number, **shared) for number in in_flight),
            *(Load(rate_qps=rate, **shared) for rate in rates),
        ]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _users(
    repository: Path | None, queries: Path | None, model: str | None, limit: int, seed: int
) -> list[User]:
    from nann.offline.benchmark.users import read_users, sample_users

    if queries is not None:
        return read_users(queries)
    if repository is None:
        raise typer.BadParameter("whom to ask for? give --repository (its users) or --queries as well")
    from nann.cli.benchmark_engine import find_version

    return sample_users(find_version(repository, model), limit=limit, seed=seed)


# Targets, not yet opened

_Opened = AbstractAsyncContextManager["Target"]


def _remote(url: str, ask: Ask, users: Sequence[User], timeout_s: float, credentials: Credentials) -> _Opened:
    from nann.cli.benchmark_targets import grpc_target, rest_target

    target = grpc_target if url.startswith("grpc") else rest_target
    return target(url, ask, users, timeout_s=timeout_s, credentials=credentials)


def _predict(
    url: str,
    ask: Ask,
    repository: Path | None,
    requests: int,
    seed: int,
    timeout_s: float,
    credentials: Credentials,
) -> _Opened:
    from nann.cli.benchmark_engine import find_version
    from nann.cli.benchmark_targets import predict_target
    from nann.engine.artifacts import read_manifest

    if "level_topn" not in (ask.params or {}):
        raise typer.BadParameter("--predict needs --level-topn t0,t1,t2,t3,t4,t5")
    width = _NANN_COMM_SEQ_WIDTH
    if repository is not None:
        manifest = read_manifest(find_version(repository, ask.model))
        width = manifest.history_length * manifest.input_dim
    return predict_target(
        url,
        ask,
        comm_seq_width=width,
        requests=requests,
        seed=seed,
        timeout_s=timeout_s,
        credentials=credentials,
    )


def _local(
    repository: Path,
    queries: Path | None,
    ask: Ask,
    engine_flags: dict[str, Any],
    limit: int,
    seed: int,
    timeout_s: float,
) -> tuple[_Opened, dict[str, Any]]:
    """The target, and the settings that decide its speed."""
    from nann.cli.benchmark_engine import find_version, in_process, in_words
    from nann.offline.progress import Progress
    from nann.service.registry import engine_loader
    from nann.service.settings import load_settings

    version_dir = find_version(repository, ask.model)
    settings = load_settings(repository=repository, **engine_flags)
    users = _users(version_dir, queries, None, limit, seed)
    with Progress() as progress, progress.stage("load and compile"):
        engine = engine_loader(settings)(version_dir)
    return in_process(engine, settings, ask, users, timeout_s=timeout_s), in_words(settings, engine)


# Measuring


def _measure(
    target: _Opened, loads: Sequence[Load], rounds: int, seed: int, workload: dict[str, Any], *, as_json: bool
) -> None:
    import uvloop

    from nann.offline.benchmark.machine import Machine
    from nann.offline.benchmark.report import load_json, load_text
    from nann.offline.progress import Progress

    machine = Machine.here()
    with Progress() as progress:
        results = uvloop.run(_run(target, loads, rounds, seed, progress))
    emit(load_json(results, machine, workload), as_json=as_json, words=load_text(results, machine, workload))


async def _run(
    opened: _Opened, loads: Sequence[Load], rounds: int, seed: int, progress: Progress
) -> list[LoadResult]:
    from nann.offline.benchmark.load import OK
    from nann.offline.benchmark.run import run_loads

    async with opened as target:
        first = await target.send(0)
        if first.code != OK:
            raise BenchmarkFailed(f"the first request failed: {first.code}; see whether nann query succeeds")
        return await run_loads(target, loads, rounds=rounds, seed=seed, progress=progress)
