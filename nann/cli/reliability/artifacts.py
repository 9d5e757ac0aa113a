"""Damaged versions offered to a running server: each is refused, and the old one goes on serving."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson
import uvloop

from nann.cli.benchmark_engine import find_version
from nann.cli.benchmark_http import HttpClient
from nann.cli.reliability.damage import damage, link_version
from nann.cli.server_process import running_server
from nann.offline.benchmark.users import sample_users
from nann.offline.progress import Progress, Stage

__all__ = ["ArtifactsResult", "measure_damage", "offer_damaged"]

_TIMEOUT_S: Final = 60.0
_MODEL: Final = "nann"


@dataclass(slots=True)
class ArtifactsResult:
    """What became of the damaged versions, and of the queries meanwhile."""

    versions: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    queries: int = 0
    wrong_answers: int = 0

    @property
    def kept(self) -> bool:
        return not self.failures and not self.wrong_answers and sum(self.refused.values()) == self.versions

    def words(self) -> str:
        """The result in one sentence."""
        kinds = ", ".join(f"{count:,} of faulty {kind}" for kind, count in self.refused.most_common())
        return (
            f"{self.versions:,} damaged versions: {sum(self.refused.values()):,} refused ({kinds}); "
            f"{self.queries:,} queries meanwhile, {self.wrong_answers} without the old version's answer"
            + "".join(f"; {failure}" for failure in self.failures[:10])
        )


def measure_damage(repository: Path, model: str | None, *, versions: int, seed: int) -> ArtifactsResult:
    """Offer `versions` damaged copies of a version to a server of its own.

    Raises:
        ServerError: it did not start.
    """
    source = find_version(repository, model).resolve()
    user = sample_users(source, limit=1, seed=seed)[0]
    query = orjson.dumps({"history": user.history, "k": 50})
    with tempfile.TemporaryDirectory(prefix="nann-reliability-") as place, Progress() as progress:
        served = Path(place, "repository", _MODEL)
        served.mkdir(parents=True)
        copy = Path(place, "copy")
        shutil.copytree(source, copy)  # where versions may be links to it
        link_version(copy, served / "1")
        with (
            progress.stage("damage", total=versions, unit="versions") as stage,
            running_server(
                served.parent, log_path=Path(place, "server.log"), flags=["--poll-interval-s", "0"]
            ) as server,
        ):
            return uvloop.run(
                offer_damaged(server.rest_url, copy, served, query, versions=versions, seed=seed, stage=stage)
            )


async def offer_damaged(
    url: str,
    source: Path,
    served: Path,
    query: bytes,
    *,
    versions: int,
    seed: int,
    stage: Stage | None = None,
) -> ArtifactsResult:
    """Offer damaged copies of `source` under the model directory `served`, one after another."""
    client = HttpClient(url, timeout_s=_TIMEOUT_S)
    result = ArtifactsResult()
    rng = random.Random(seed)
    wanted = await _items(client, query)
    asking = asyncio.create_task(_ask(client, query, wanted, result))
    try:
        for number in range(2, versions + 2):
            target = served / str(number)
            staged = served.parent.parent / "staged"  # so that it appears whole
            await asyncio.to_thread(link_version, source, staged)
            kind, how = await asyncio.to_thread(damage, staged, rng)
            staged.rename(target)
            result.versions += 1
            status, body = await client.post("/models/rescan", b"{}")
            _judge(result, number, kind, how, status, body)
            await asyncio.to_thread(shutil.rmtree, target)
            if stage is not None:
                stage.advance()
    finally:
        asking.cancel()
        await asyncio.wait({asking})
        await client.close()
    if asking.done() and not asking.cancelled() and asking.exception() is not None:
        result.failures.append(f"queries failed: {asking.exception()!r}")
    return result


def _judge(result: ArtifactsResult, number: int, kind: str, how: str, status: int, body: bytes) -> None:
    states: dict[int, Any] = {}
    if status == 200:
        states = {state["version"]: state for state in orjson.loads(body)["models"][_MODEL]}
    old, new = states.get(1), states.get(number)
    clean = (
        old is not None
        and old["state"] == "AVAILABLE"
        and new is not None
        and new["state"] == "END"
        and new["error_code"] != "OK"
        and not new["error_message"].startswith("internal error")
    )
    if clean:
        result.refused[kind] += 1
    else:
        result.failures.append(f"{how}: {status} {body[:400]!r}")


async def _ask(client: HttpClient, query: bytes, wanted: Any, result: ArtifactsResult) -> None:
    while True:
        result.queries += 1
        result.wrong_answers += await _items(client, query) != wanted


async def _items(client: HttpClient, query: bytes) -> Any:
    status, body = await client.post("/retrieve", query)
    reply = orjson.loads(body)
    return (status, reply.get("version"), reply.get("items"))
