"""REST over a real port: what the contract promises when all goes well, probes, metrics, documentation."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from transports import Transports

from nann.service.http_api import docs


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Transports]:
    async with Transports(tmp_path, FakeEngine()).open() as opened:
        yield opened


async def test_the_reply_is_the_contracts(world: Transports) -> None:
    response = await world.http.post("/retrieve", json={"history": [0, 4, 12345], "k": 3})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["items", "model", "version", "n_scored", "timings_ms", "notes"]
    assert [item["item_id"] for item in body["items"]] == [1, 2, 3]
    assert body["items"][1] == {"item_id": 2, "score": -1.0, "attributes": {"title": "title of 2"}}
    assert (body["model"], body["version"], body["n_scored"]) == ("nann", 1, 100)
    assert set(body["timings_ms"]) == {"queue", "search", "total"}
    assert {"code": "unknown_history_items", "message": "skipped", "count": 1} in body["notes"]


async def test_defaults_and_options(world: Transports) -> None:
    body = (await world.http.post("/retrieve", json={"user_id": 1})).json()
    assert len(body["items"]) == 200
    options = {"history": [1], "exclude_seen": False, "explain": True}
    body = (await world.http.post("/retrieve", json={**options, "include_ids": [1, 5]})).json()
    assert body["items"][0] == {"item_id": 1, "score": 0.0, "attributes": {"title": "title of 1"}}
    assert body["explain"]["steps"] == 3
    level = {"user_id": 1, "params": {"level_topn": [9, 9, 9, 9, 9, 7]}}
    assert len((await world.http.post("/retrieve", json=level)).json()["items"]) == 7
    comm_seq = {"comm_seq": [[0] * 64] * 50, "k": 1}
    assert len((await world.http.post("/retrieve", json=comm_seq)).json()["items"]) == 1


async def test_string_ids(tmp_path: Path) -> None:
    engine = FakeEngine(item_id_type="str", user_id_type="str")
    async with Transports(tmp_path, engine).open() as world:
        body = (
            await world.http.post("/retrieve", json={"history": ["item0"], "k": 1, "with_attributes": False})
        ).json()
        assert body["items"] == [{"item_id": "item1", "score": 0.0}]


async def test_request_ids(world: Transports) -> None:
    given = await world.http.get("/livez", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    for bad in ("", "has blank", "x" * 200):
        made = await world.http.get("/livez", headers={"x-request-id": bad})
        assert re.fullmatch("[0-9a-f]{32}", made.headers["x-request-id"])


async def test_the_live_history(world: Transports) -> None:
    assert (await world.http.get("/users/7")).status_code == 404
    response = await world.http.post("/users/7/events", json={"item_ids": [3, 4]})
    assert (response.status_code, response.json()) == (200, {"user_id": 7, "recorded": 2})
    response = await world.http.get("/users/7")
    assert response.json() == {"user_id": 7, "history": [3, 4], "n_base": 0, "n_live": 2}
    assert (await world.http.get("/users/1", params={"model": "nann"})).json()["n_base"] == 3
    assert (await world.http.get("/users/1", params={"model": "x"})).status_code == 404
    response = await world.http.delete("/users/7")
    assert response.json() == {"user_id": 7, "deleted": True}
    assert (await world.http.get("/users/7")).status_code == 404
    assert (await world.http.delete("/users/7")).status_code == 404
    bodies: list[Any] = [{}, {"item_ids": []}, {"item_ids": ["a"]}, {"item_ids": [1], "x": 1}]
    for bad in bodies:
        assert (await world.http.post("/users/7/events", json=bad)).status_code == 422


async def test_user_ids_that_need_escaping(tmp_path: Path) -> None:
    engine = FakeEngine(user_id_type="str")
    async with Transports(tmp_path, engine).open() as world:
        path = "/users/a%2Fb%20%C3%A9%3F"
        assert (await world.http.post(f"{path}/events", json={"item_ids": [1]})).status_code == 200
        assert (await world.http.get(path)).json()["user_id"] == "a/b é?"


async def test_probes(tmp_path: Path) -> None:
    async with Transports(tmp_path, FakeEngine()).open(load=False) as world:
        assert (await world.http.get("/livez")).status_code == 200
        response = await world.http.get("/readyz")
        assert (response.status_code, response.json()) == (503, {"status": "loading"})
        await world.registry.load()
        world.health.loaded()
        assert (await world.http.get("/readyz")).status_code == 200
        assert (await world.http.get("/healthz")).json() == {
            "status": "ready",
            "models": ["nann"],
            "impaired_models": [],
        }
        world.health.lanes_changed("nann", 1, proven=0, lanes=2)
        assert (await world.http.get("/healthz")).json()["impaired_models"] == ["nann"]
        world.health.draining()
        assert (await world.http.get("/readyz")).json() == {"status": "draining"}
        assert (await world.http.get("/livez")).status_code == 200


async def test_metrics_count_requests_without_foreign_labels(world: Transports) -> None:
    await world.http.post("/retrieve", json={"user_id": 1})
    await world.http.post("/retrieve", json={"user_id": 1, "model": "made-up"})
    await world.http.post("/retrieve", content=b"{")
    response = await world.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    text = response.text
    assert 'nann_requests_total{api="rest",code="ok",method="retrieve",model="nann"} 1.0' in text
    assert 'code="unknown_model",method="retrieve",model="unknown"} 1.0' in text
    assert 'code="malformed_json",method="retrieve"' in text
    assert "made-up" not in text


async def test_model_status_as_tensorflow_serving(world: Transports) -> None:
    state = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    for path in ("/v1/models/nann", "/v1/models/nann/versions/1"):
        assert (await world.http.get(path)).json() == {"model_version_status": [state]}
    response = await world.http.get("/v1/models/x")
    assert (response.status_code, response.json()) == (
        404,
        {"error": "Could not find any versions of model x"},
    )
    response = await world.http.get("/v1/models/nann/versions/7")
    assert response.json() == {"error": "Could not find version 7 of model nann"}


async def test_documentation_needs_no_network(world: Transports) -> None:
    page = (await world.http.get("/docs")).text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    assert not re.search(r"https?://", page)
    for source in sources:
        asset = await world.http.get(source)
        assert asset.status_code == 200, source
        assert len(asset.content) > 100


async def test_openapi_examples_are_answered(world: Transports) -> None:
    response = await world.http.get("/openapi.json")
    document, text = response.json(), response.text
    assert {"/retrieve", "/users/{user_id}", "/users/{user_id}/events", "/livez"} <= set(document["paths"])
    media = document["paths"]["/retrieve"]["post"]["requestBody"]["content"]["application/json"]
    assert len(media["examples"]) >= 5
    for name, example in media["examples"].items():
        response = await world.http.post("/retrieve", json=example["value"])
        assert response.status_code == 200, (name, response.text)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert {"RetrieveBody", "BatchBody", "EventsBody", "ErrorReply"} <= references
    assert references <= set(document["components"]["schemas"])
    assert "user_id" in document["components"]["schemas"]["RetrieveBody"]["properties"]


async def test_documented_models_accept_the_real_replies(world: Transports) -> None:
    query = {"user_id": 1, "k": 2, "explain": True, "with_attributes": True}
    reply = (await world.http.post("/retrieve", json=query)).json()
    docs.RetrieveReplyBody.model_validate(reply, strict=True)
    batch = (await world.http.post("/retrieve", json={"queries": [query, {"user_id": 9}]})).json()
    docs.BatchReplyBody.model_validate(batch)
    docs.UserReply.model_validate((await world.http.get("/users/1")).json(), strict=True)
    docs.ErrorReply.model_validate((await world.http.get("/users/9")).json(), strict=True)
