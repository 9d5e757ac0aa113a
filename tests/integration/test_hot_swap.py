"""Versions swapped under traffic: no request fails, no answer mixes versions, leases are respected."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from golden import GOLDEN, load_engine
from transports import Transports
from typing_extensions import override

from nann.engine.types import Hits, ItemId
from nann.service.pb import retrieval_pb2 as pb
from nann.service.wire import tf_messages
from nann.service.wire.tensors import decode_tensor, encode_tensor

N_SWAPS = 20
LEVEL_TOPN = [9, 9, 9, 9, 9, 4]


class NumberedEngine(FakeEngine):
    """Every item id it returns, and every item it knows, tells its version; useless once closed."""

    n_used_after_close = 0

    @override
    def _ids(self) -> list[ItemId]:
        first = self.manifest.version * 1_000_000
        return list(range(first, first + 50))

    @override
    def search(self, *args: Any, **more: Any) -> list[Hits]:
        NumberedEngine.n_used_after_close += self.closed
        return super().search(*args, **more)


def predict_request(rows: int) -> Any:
    request = tf_messages.PredictRequest()
    request.model_spec.name = "nann"
    encode_tensor(np.zeros((rows, 3200), np.float16), request.inputs["comm_seq"])
    encode_tensor(np.array(LEVEL_TOPN, np.int32), request.inputs["level_topn"])
    return request


async def test_twenty_swaps_in_a_row(tmp_path: Path) -> None:
    engines: list[NumberedEngine] = []

    def load(path: Path) -> Any:
        engines.append(NumberedEngine(version=int(path.name), max_batch=4))
        return engines[-1]

    comm_seq = [[0.0] * 64] * 50
    world = Transports(tmp_path, FakeEngine(), load_engine=load)
    async with world.open():
        stopping = asyncio.Event()
        answered: dict[str, set[int]] = {}

        async def retrieve() -> tuple[set[int], set[int]]:
            body = {"comm_seq": comm_seq, "k": 3}
            reply = (await world.http.post("/retrieve", json=body)).raise_for_status().json()
            return {reply["version"]}, {item["item_id"] for item in reply["items"]}

        async def retrieve_batch() -> tuple[set[int], set[int]]:
            body = {"queries": [{"comm_seq": comm_seq, "k": 3, "filter": {}}] * 5}
            results = (await world.http.post("/retrieve", json=body)).raise_for_status().json()["results"]
            items = {item["item_id"] for result in results for item in result["items"]}
            return {result["version"] for result in results}, items

        async def rpc() -> tuple[set[int], set[int]]:
            reply = await world.native.Retrieve(
                pb.RetrieveRequest(comm_seq=pb.EmbeddedHistory(values=[0.0] * 3200), k=3)
            )
            return {reply.version}, {item.item_id.number for item in reply.items}

        async def predict() -> tuple[set[int], set[int]]:
            reply = await world.predict(predict_request(rows=6))
            items = decode_tensor(reply.outputs["top_k"], "top_k")
            return {reply.model_spec.version.value}, set(items.reshape(-1).tolist())

        async def rest_predict() -> tuple[set[int], set[int]]:
            body = {"inputs": {"comm_seq": [[0.0] * 3200] * 3, "level_topn": LEVEL_TOPN}}
            reply = (await world.http.post("/v1/models/nann:predict", json=body)).raise_for_status()
            items = {item for row in reply.json()["outputs"] for item in row}
            return {item // 1_000_000 for item in items}, items

        async def keep_asking(ask: Callable[[], Awaitable[tuple[set[int], set[int]]]]) -> None:
            last = False
            while not last:
                last = stopping.is_set()
                versions, items = await ask()
                assert {item // 1_000_000 for item in items} == versions
                assert len(versions) == 1
                answered.setdefault(ask.__name__, set()).update(versions)

        asking = [
            asyncio.create_task(keep_asking(ask))
            for ask in (retrieve, retrieve_batch, rpc, predict, rest_predict)
            for _ in range(2)
        ]
        for version in range(2, N_SWAPS + 2):
            (tmp_path / "nann" / str(version)).mkdir()
            before = len(engines)
            (await world.http.post("/models/rescan")).raise_for_status()
            assert len(engines) == before + 1
            await asyncio.wait(asking, timeout=0.02, return_when=asyncio.FIRST_EXCEPTION)
        stopping.set()
        await asyncio.gather(*asking)
        assert {name: max(versions) for name, versions in answered.items()} == dict.fromkeys(
            ("retrieve", "retrieve_batch", "rpc", "predict", "rest_predict"), N_SWAPS + 1
        )
        assert not engines[-1].closed
    assert all(engine.closed for engine in engines)
    assert NumberedEngine.n_used_after_close == 0


@pytest.mark.slow
async def test_a_real_version_swapped_gives_the_same_answers(tmp_path: Path) -> None:
    """The golden artifact under three numbers, under traffic; a damaged fourth changes nothing."""
    versions = itertools.count(2)
    world = Transports(
        tmp_path, FakeEngine(), load_engine=lambda path: load_engine(path, max_batch=2), max_batch_size=2
    )
    shutil.rmtree(tmp_path / "nann" / "1")

    def publish() -> Path:
        return shutil.copytree(GOLDEN / "artifact", tmp_path / "nann" / str(next(versions)))

    publish()
    async with world.open():
        metadata = world.service.metadata()
        comm_seq = [[0.25] * metadata.input_dim] * metadata.history_length
        query = {"comm_seq": comm_seq, "k": 10, "with_attributes": False}
        first = (await world.http.post("/retrieve", json=query)).raise_for_status().json()["items"]
        stopping = asyncio.Event()
        seen: set[int] = set()

        async def keep_asking() -> None:
            while not stopping.is_set():
                reply = (await world.http.post("/retrieve", json=query)).raise_for_status().json()
                assert reply["items"] == first
                seen.add(reply["version"])

        asking = asyncio.create_task(keep_asking())
        for _ in range(2):
            publish()
            await world.http.post("/models/rescan", timeout=120)
        damaged = publish()
        (damaged / "arrays" / "item_ids.npy").write_bytes(b"")
        states = (await world.http.post("/models/rescan", timeout=120)).json()["models"]["nann"]
        stopping.set()
        await asking
        assert seen == {2, 3, 4}
        assert (states[0]["state"], states[1]["state"]) == ("END", "AVAILABLE")
        assert states[0]["error_message"].startswith("nann/5/arrays/item_ids.npy: expected")
