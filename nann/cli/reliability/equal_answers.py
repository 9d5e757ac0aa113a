"""The same queries over every surface, alone and in batches of every size: one answer, bit for bit."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import orjson
import typer
import uvloop

from nann.cli.benchmark_engine import find_version
from nann.cli.benchmark_http import HttpClient
from nann.cli.output import JsonOption
from nann.cli.reliability.row import print_row
from nann.cli.reliability.surfaces import Answer, Surface, open_surfaces
from nann.cli.server_process import running_server
from nann.engine.artifacts import read_manifest
from nann.offline.benchmark.embedded import embedded_histories
from nann.offline.progress import Progress, Stage

if TYPE_CHECKING:
    from jaxtyping import Float16

__all__ = ["EqualAnswers", "compare_surfaces", "equal_answers_command", "measure_equal_answers"]

_LEVEL_TOPN = "100,200,200,200,200,200"
_LARGEST_BATCH = 16
# Long, so that a busy machine is slow and not wrong.
_TIMEOUT_S = 600.0
# Those whose calls take one query; a batch of one is asked for over all others.
_SINGLE = ("REST", "gRPC Retrieve")
# TensorFlow Serving's have one form for both.
_ALONE = (*_SINGLE, ":predict inputs", ":predict instances", "Predict")
# What a query is asked: alone and first, alone over five surfaces, in batches over five.
_WAYS = 11


@dataclass(frozen=True, slots=True)
class _Call:
    surface: str
    queries: tuple[int, ...]


@dataclass(slots=True)
class EqualAnswers:
    """How many answers were compared with the first one to the same query, and which were not equal.

    `ids` counts answers of other items or another order, `scores` those of the same items with other
    scores, by surface; `worst` is the largest difference of an item's two scores.
    """

    queries: int = 0
    calls: int = 0
    answers: int = 0
    short: int = 0
    engine_batches: dict[str, int] = field(default_factory=dict)
    placement: str = ""
    ids: Counter[str] = field(default_factory=Counter)
    scores: Counter[str] = field(default_factory=Counter)
    unequal_queries: set[int] = field(default_factory=set)
    worst: float = 0.0
    first: tuple[int, str] | None = None

    @property
    def kept(self) -> bool:
        return self.answers > 0 and not self.ids and not self.scores

    def compare(self, query: int, expected: Answer, found: Answer, call: _Call) -> None:
        """Count one answer, which came in `call`, against the first to the same query."""
        self.answers += 1
        same_ids, same_scores = expected.ids == found.ids, expected.same_scores(found)
        if same_ids and same_scores:
            return
        (self.scores if same_ids else self.ids)[call.surface] += 1
        self.unequal_queries.add(query)
        scores = dict(zip(expected.ids, expected.scores, strict=True))
        for item, score in zip(found.ids, found.scores, strict=True):
            if item in scores:
                self.worst = max(self.worst, abs(score - scores[item]))
        if self.first is None or query < self.first[0]:
            self.first = (query, _described(expected, found, call))

    def words(self) -> str:
        """The result in one sentence."""
        words = (
            f"{self.queries:,} queries, {self.calls:,} calls, {self.answers:,} answers compared with the "
            f"first of their query: {sum(self.ids.values()):,} with other ids, "
            f"{sum(self.scores.values()):,} with other scores only"
        )
        if self.unequal_queries:
            counts = ", ".join(f"{name} {n:,}" for name, n in sorted((self.ids + self.scores).items()))
            n_queries = len(self.unequal_queries)
            words += f" ({counts}; of {n_queries:,} queries; scores at most {self.worst:.2g} apart)"
        if self.short:
            words += f"; {self.short:,} queries have fewer than k items"
        if self.engine_batches:
            sizes = ", ".join(f"≤ {size}: {n:,}" for size, n in self.engine_batches.items() if n)
            words += f"; searches by the queries that shared them {sizes}"
        if self.placement:
            words += f"; {self.placement}"
        return words + (f"; first: query {self.first[0]}: {self.first[1]}" if self.first else "")


def equal_answers_command(
    repository: Annotated[Path, typer.Option(help="A model repository; nothing is written into it.")],
    model: Annotated[str | None, typer.Option(help="Its model, where it has several.")] = None,
    queries: Annotated[
        int, typer.Option(min=1, help="Users asked for, each by an embedded history.")
    ] = 1_000,
    level_topn: Annotated[str, typer.Option(help="NANN's six widths t0 … t5, with commas.")] = _LEVEL_TOPN,
    scorer: Annotated[str, typer.Option(help="--scorer of the server.")] = "auto",
    in_flight: Annotated[
        int, typer.Option(min=1, help="Calls under way at a time, after the first of each query.")
    ] = 4,
    seed: Annotated[int, typer.Option(help="Seed of users and of the order of calls.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """The same queries over every surface, alone and in batches of every size; needs TensorFlow here."""
    result = measure_equal_answers(
        repository,
        model,
        queries=queries,
        level_topn=_widths(level_topn),
        flags=["--scorer", scorer],
        in_flight=in_flight,
        seed=seed,
    )
    print_row(
        f"Equal answers: {queries:,} queries (histories embedded in half precision, level_topn "
        f"[{level_topn}], nothing excluded) over REST, gRPC, `:predict` and Predict, alone and in batches of "
        f"1 … {_LARGEST_BATCH}: the same ids and scores, bit for bit",
        result.words(),
        kept=result.kept,
        as_json=as_json,
    )


def _widths(text: str) -> list[int]:
    try:
        return [int(width) for width in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--level-topn: {error}") from None


def measure_equal_answers(
    repository: Path,
    model: str | None,
    *,
    queries: int,
    level_topn: Sequence[int],
    flags: Sequence[str],
    in_flight: int,
    seed: int,
) -> EqualAnswers:
    """Ask a server of its own on `repository`, with more `flags`; users come from the newest version.

    Raises:
        ServerError: it did not start.
        ValueError: there are fewer users with a history, or the model has no input tables.
        RuntimeError, AioRpcError: a call was refused or failed.
    """
    version_dir = find_version(repository, model)
    histories = embedded_histories(version_dir, limit=queries, seed=seed)
    name = read_manifest(version_dir).model_name
    with tempfile.TemporaryDirectory(prefix="nann-reliability-") as place, Progress() as progress:
        log_path = Path(place, "server.log")
        own = [*flags, "--log-format", "json", "--default-timeout-ms", str(1e3 * _TIMEOUT_S)]
        with (
            running_server(repository, log_path=log_path, flags=own) as server,
            progress.stage("equal answers", total=queries * _WAYS, unit="answers") as stage,
        ):
            result = uvloop.run(
                compare_surfaces(
                    server.rest_url,
                    server.grpc_url,
                    name,
                    histories,
                    level_topn,
                    in_flight=in_flight,
                    seed=seed,
                    stage=stage,
                )
            )
        result.placement = _placement(log_path)
        return result


async def compare_surfaces(
    rest_url: str,
    grpc_url: str,
    model: str,
    histories: Float16[np.ndarray, "queries length D"],
    level_topn: Sequence[int],
    *,
    in_flight: int,
    seed: int,
    stage: Stage | None = None,
) -> EqualAnswers:
    """Ask a running server every query alone, one call at a time, then over every surface in every way.

    Every surface gets every query alone, and in batches of 1, 2, … 16, 1, … queries as they are drawn,
    all calls in random order and `in_flight` at a time, so that the searches of callers of different
    surfaces are shared. Raises RuntimeError or AioRpcError when a call is refused or fails.
    """
    result = EqualAnswers(queries=len(histories))

    async def ask(surface: Surface, numbers: tuple[int, ...]) -> list[Answer]:
        answers = await surface(histories[list(numbers)])
        if len(answers) != len(numbers):
            raise RuntimeError(f"{len(answers)} answers to {len(numbers)} queries")
        result.calls += 1
        if stage is not None:
            stage.advance(len(numbers))
        return answers

    async with open_surfaces(rest_url, grpc_url, model, level_topn, timeout_s=_TIMEOUT_S) as surfaces:
        expected = [
            answer for number in range(len(histories)) for answer in await ask(surfaces["REST"], (number,))
        ]
        result.short = sum(len(answer.ids) < level_topn[-1] for answer in expected)
        calls = iter(_calls(len(histories), list(surfaces), np.random.default_rng(seed)))

        async def caller() -> None:
            for call in calls:
                answers = await ask(surfaces[call.surface], call.queries)
                for number, answer in zip(call.queries, answers, strict=True):
                    result.compare(number, expected[number], answer, call)

        callers = [asyncio.create_task(caller()) for _ in range(in_flight)]
        try:
            await asyncio.gather(*callers)
        finally:
            for task in callers:
                task.cancel()
    result.engine_batches = await _engine_batches(rest_url)
    return result


def _calls(n_queries: int, surfaces: Sequence[str], rng: np.random.Generator) -> list[_Call]:
    """Every query alone and in a batch over each of the surfaces that can, in random order."""
    calls = [_Call(name, (number,)) for name in _ALONE for number in range(n_queries)]
    for name in surfaces:
        if name not in _SINGLE:
            calls += [_Call(name, batch) for batch in _batches(rng.permutation(n_queries).tolist())]
    return [calls[i] for i in rng.permutation(len(calls))]


def _batches(numbers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Cut into parts of 1, 2, … 16, 1, 2, …"""
    start, size = 0, 1
    while start < len(numbers):
        yield tuple(numbers[start : start + size])
        start, size = start + size, size % _LARGEST_BATCH + 1


def _described(expected: Answer, found: Answer, call: _Call) -> str:
    """Where two answers part."""
    where = f"{call.surface}, {len(call.queries)} in the call"
    if len(expected.ids) != len(found.ids):
        return f"{where}: {len(found.ids)} items, not {len(expected.ids)}"
    pairs = zip(expected.ids, expected.scores, found.ids, found.scores, strict=True)
    for place, (item, score, other_item, other_score) in enumerate(pairs):
        if (item, score) != (other_item, other_score):
            return f"{where}: place {place} has {other_item!r} ({other_score!r}), not {item!r} ({score!r})"
    return f"{where}: zeros of another sign"


async def _engine_batches(rest_url: str) -> dict[str, int]:
    """The server's own histogram of the queries that shared a search, by upper bound."""
    client = HttpClient(rest_url, timeout_s=_TIMEOUT_S)
    try:
        text = (await client.get("/metrics"))[1].decode()
    finally:
        await client.close()
    counts: dict[str, int] = {}
    below = 0
    for line in text.splitlines():
        if line.startswith("nann_batch_size_bucket"):
            bound = line.partition('le="')[2].partition('"')[0]
            total = round(float(line.rpartition(" ")[2]))
            counts[bound.removesuffix(".0")] = total - below
            below = total
    return counts


def _placement(log_path: Path) -> str:
    """What the server's log says of where it searches, and its warning of scores that differ by shape."""
    words = []
    for line in log_path.read_bytes().splitlines():
        if not line.startswith(b"{"):
            continue
        entry = orjson.loads(line)
        if entry.get("event") == "device":
            words.append(entry["chosen"])
        elif "scores depend on the shape" in entry.get("event", ""):
            words.append("warned at its start that scores depend on the shape")
    return "; ".join(words)
