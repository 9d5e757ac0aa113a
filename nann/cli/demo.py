"""``nann demo``: a click log to answers over REST and gRPC, and what they are worth, in a few minutes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nann.cli.answers import ask, ask_rest
from nann.cli.output import JsonOption, console, emit, table
from nann.cli.query import answer_table, timing_line
from nann.cli.server_process import RunningServer, running_server

if TYPE_CHECKING:
    from nann.engine.types import ItemId, UserId
    from nann.offline.pipeline import PipelineOptions

__all__ = ["DEMO_TRAINING", "demo_command"]

# Chosen for time: NANN trains for hours, this has minutes on two cores. After 300 such steps the hit
# rate on the synthetic catalogue is twenty times that of popularity already (docs/adr/0005).
DEMO_TRAINING: Mapping[str, Any] = {"batch_size": 256, "epochs": 50, "eval_every": 300}
# A log of one's own gets more: MovieLens-1M needs it, and its installation is not part of ten minutes.
DEMO_STEPS, DEMO_STEPS_OF_INPUT = 900, 1500
DEMO_EVALUATION: Mapping[str, Any] = {"n_tune": 100, "n_report": 300}
_N_TIMED_QUERIES = 300
_SHOWN_HISTORY = 8
_SHOWN_ITEMS = 10


@dataclass(frozen=True, slots=True)
class _User:
    """A held-out user to ask for, and the last items they had before."""

    user_id: UserId
    history: Sequence[tuple[ItemId, str]]


def demo_command(
    input: Annotated[
        Path | None, typer.Option(exists=True, help="A click log; by default a synthetic catalogue is made.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("demo"),
    max_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Training steps (default {DEMO_STEPS}, or {DEMO_STEPS_OF_INPUT} with --input)."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the pipeline, serve the result, ask it over REST and gRPC, and sum up how good it is."""
    from nann.offline.pipeline import run_pipeline
    from nann.offline.progress import Progress

    started_s = time.monotonic()
    run_dir = output / (input.resolve().name.split(".")[0] if input else "synthetic")
    if max_steps is None:
        max_steps = DEMO_STEPS if input is None else DEMO_STEPS_OF_INPUT
    with Progress() as progress:
        if input is None:
            input = _synthetic_catalogue(output, progress)
        pipeline = run_pipeline(input, run_dir, options=_options(max_steps), progress=progress)
        report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
        users = _held_out_users(run_dir / "data", _N_TIMED_QUERIES)
        progress.line("start the server")
        with running_server(pipeline.repository, log_path=run_dir / "server.log") as server:
            progress.line(
                f"ready after {server.start_s:.1f} s: {server.rest_url}, {server.grpc_url.partition('//')[2]}"
            )
            over_rest, over_grpc = _ask_twice(server, users[0])
            latency_ms = _latency_ms(server.rest_url, users)
    seconds = time.monotonic() - started_s
    if as_json:
        served = {"rest": over_rest, "grpc": over_grpc, "latency_ms": latency_ms, "seconds": seconds}
        emit({"report": report, **served}, as_json=True, words="")
        return
    out = console()
    out.print(
        table(f"User {users[0].user_id}: newest items of the history", ["item", "title"], users[0].history)
    )
    out.print(answer_table(over_rest, f"Answer over REST ({timing_line(over_rest)})"))
    out.print(answer_table(over_grpc, f"Answer over gRPC ({timing_line(over_grpc)})"))
    out.print(_summary(report, latency_ms))
    out.print(
        f"{seconds:.0f} s in all. {pipeline.report} has the details. "
        f"Serve it yourself: nann serve --repository {pipeline.repository}"
    )


def _synthetic_catalogue(output: Path, progress: Any) -> Path:
    from nann.offline.data.synthetic import generate_user_behavior

    directory = output / "catalogue"
    path = directory / "UserBehavior.csv"
    if not path.is_file():
        # The log appears under its name last, so that an interrupted run does not leave half of one.
        with progress.stage("make a synthetic catalogue"):
            made = generate_user_behavior(directory / "UserBehavior.partial.csv")
            made.path.rename(path)
    return path


def _options(max_steps: int) -> PipelineOptions:
    from nann.offline.pipeline import PipelineOptions

    training = {**DEMO_TRAINING, "max_steps": max_steps}
    return PipelineOptions(train=training, evaluate=DEMO_EVALUATION)


def _held_out_users(data_dir: Path, count: int) -> list[_User]:
    """Test users, those with a whole history first; titles where the data has them."""
    import numpy as np

    from nann.offline.data.dataset import Dataset

    dataset = Dataset.load(data_dir)
    rows, histories, _ = dataset.eval_samples("test")
    longest_first = np.argsort(-(histories >= 0).sum(axis=1), kind="stable")[:count]
    items = dataset.items
    titles = items["title"].to_list() if "title" in items.columns else [""] * dataset.num_items
    return [
        _User(
            dataset.user_ids[rows[sample]].item(),
            [
                (dataset.item_ids[item].item(), titles[item] or "")
                for item in histories[sample][histories[sample] >= 0][-_SHOWN_HISTORY:]
            ],
        )
        for sample in longest_first
    ]


def _ask_twice(server: RunningServer, user: _User) -> tuple[dict[str, Any], dict[str, Any]]:
    body = {"user_id": user.user_id, "k": _SHOWN_ITEMS, "with_attributes": True}
    return ask(server.rest_url, body), ask(server.grpc_url, body)


def _latency_ms(url: str, users: Sequence[_User]) -> dict[str, float]:
    """p50 and p99 at the client, of one REST query at a time for 200 items, after ten unmeasured ones."""
    import httpx
    import numpy as np

    times_ms = []
    with httpx.Client(base_url=url, timeout=30.0) as client:
        for user in [*users[:10], *users]:
            sent_s = time.perf_counter()
            ask_rest(client, {"user_id": user.user_id, "k": 200})
            times_ms.append(1e3 * (time.perf_counter() - sent_s))
    p50, p99 = np.percentile(times_ms[10:], [50, 99])
    return {"p50": float(p50), "p99": float(p99)}


def _summary(report: Mapping[str, Any], latency_ms: Mapping[str, float]) -> Any:
    k, served = report["k"], report["served"]
    beaten = {row["name"]: row["metrics"]["hit_rate"] for row in report["baselines"]}

    def against(name: str) -> str:
        return f"{served['hit_rate'] / beaten[name]:.1f} times" if beaten[name] else ""

    rows = [
        (f"hit_rate@{k} of the served search", f"{100 * served['hit_rate']:.1f} %", ""),
        *((f"hit_rate@{k} of {name}", f"{100 * beaten[name]:.1f} %", against(name)) for name in beaten),
        (f"recall@{k} against exhaustive search", f"{100 * served['recall']:.1f} %", ""),
        ("items scored a query", f"{served['items_scored']:,.0f} of {report['num_items']:,}", ""),
        ("share of the corpus scored", f"{100 * served['share_scored']:.1f} %", ""),
        ("latency over REST, p50", f"{latency_ms['p50']:.1f} ms", ""),
        ("latency over REST, p99", f"{latency_ms['p99']:.1f} ms", ""),
    ]
    return table(f"{report['n_test_users']:,} held-out users", ["", "measured", "served ÷ this"], rows)
