"""Small versions of ``python -m nann.cli.reliability fuzz`` and ``artifacts``, on a fake engine."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest
from fake_engine import FakeEngine
from golden import load_engine
from transports import Transports

from nann.cli.reliability.artifacts import offer_damaged
from nann.cli.reliability.damage import damage, link_version
from nann.cli.reliability.fuzz import FuzzResult, fuzz_server
from nann.cli.reliability.inputs import Hostile, ProtoInputs
from nann.engine.artifacts import Artifact
from nann.engine.errors import ArtifactError, RetrievalError
from nann.service.pb import retrieval_pb2 as pb
from nann.service.wire import tf_messages
from nann.service.wire.native_proto import request_of_proto
from nann.service.wire.tf_model_config import configs_of_message

GOLDEN = Path(__file__).parents[1] / "golden" / "v1" / "artifact"


async def fuzz(world: Transports, requests: int) -> FuzzResult:
    url = f"http://127.0.0.1:{world.address[1]}"
    return await fuzz_server(url, f"127.0.0.1:{world.grpc_port}", requests=requests, seed=7)


async def test_no_request_is_answered_with_a_failure_of_ours(tmp_path: Path) -> None:
    async with Transports(tmp_path, FakeEngine()).open() as world:
        result = await fuzz(world, 2000)
    assert result.kept, result.words()
    assert result.requests == 2000
    # It gets through to every surface, and past their first checks.
    for answer in ("REST 200", "REST 422", "HTTP 400", "gRPC OK", "gRPC INVALID_ARGUMENT"):
        assert result.answers[answer] >= 10, result.words()
    assert result.answers["TensorProto decoded"] >= 5


async def test_a_filter_that_admits_nothing_is_answered_with_nothing(tmp_path: Path) -> None:
    """There is nothing to score, so that a rate by what was scored says nothing of it."""
    nothing = {"history": [1], "filter": {"category": 999}}
    async with Transports(tmp_path, load_engine(GOLDEN)).open() as world:
        for body in (nothing, {"queries": [nothing, nothing]}, {"history": [1]}, nothing):
            answer = await world.http.post("/retrieve", json=body)
            assert answer.status_code == 200, answer.text
            results = answer.json().get("results", [answer.json()])
            assert all(
                bool(result["items"]) == ("filter" not in body and "queries" not in body)
                for result in results
            )


async def test_the_fuzzer_sees_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Transports(tmp_path, FakeEngine()).open() as world:

        async def fail(*_args: Any, **_more: Any) -> Any:
            raise KeyError("/srv/secret")

        monkeypatch.setattr(world.service, "user", fail)
        result = await fuzz(world, 300)
    assert not result.kept
    assert any("REST 500" in failure for failure in result.failures)
    assert any("INTERNAL" in failure for failure in result.failures)


@pytest.mark.parametrize(
    ("message_class", "convert"),
    [
        (pb.RetrieveRequest, request_of_proto),
        (tf_messages.ModelServerConfig, configs_of_message),
    ],
    ids=["RetrieveRequest", "ModelServerConfig"],
)
def test_any_message_is_converted_or_refused(message_class: Any, convert: Any) -> None:
    inputs = ProtoInputs(Hostile(random.Random(7)))
    outcomes = set()
    for _ in range(2000):
        try:
            convert(inputs.message(message_class))
            outcomes.add("converted")
        except RetrievalError:
            outcomes.add("refused")
    assert "refused" in outcomes


async def test_damaged_versions_are_refused_while_the_old_one_serves(tmp_path: Path) -> None:
    source, repository = tmp_path / "source", tmp_path / "repository"
    shutil.copytree(GOLDEN, source)
    link_version(source, repository / "nann" / "1")

    def load(path: Path) -> FakeEngine:
        Artifact.open(path, verify="full")
        return FakeEngine()

    async with Transports(repository, FakeEngine(), load_engine=load, poll_interval_s=0).open() as world:
        url = f"http://127.0.0.1:{world.address[1]}"
        query = orjson.dumps({"history": [10], "k": 5})
        result = await offer_damaged(url, source, repository / "nann", query, versions=60, seed=7)
    assert result.kept, result.words()
    assert set(result.refused) == {"files", "manifests", "listings", "builders"}
    assert result.queries > 1


def test_every_kind_of_damage_is_seen_by_the_reader(tmp_path: Path) -> None:
    rng = random.Random(7)
    seen = set()
    for number in range(120):
        version = tmp_path / str(number)
        link_version(GOLDEN, version)
        _, how = damage(version, rng)
        with pytest.raises(ArtifactError) as caught:
            Artifact.open(version, verify="full")
        seen.add(how)
        assert len(str(caught.value)) < 2000
        shutil.rmtree(version)
    assert len(seen) > 50
    Artifact.open(GOLDEN, verify="full")  # the links were replaced, and nothing written through them
