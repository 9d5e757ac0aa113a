"""Every JSON example is a message that the server takes or gives, and the programs run as they stand."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from documents import DOCS, ROOT, code_blocks, command_lines, inline_code
from fake_engine import FakeEngine
from pydantic import BaseModel, ValidationError
from transports import Transports

from nann.engine.types import SearchParams
from nann.service.errors import ERROR_TABLE
from nann.service.http_api import docs as replies
from nann.service.params import search_params
from nann.service.settings import Settings
from nann.service.types import ModelMetadata, VersionStatus
from nann.service.wire.rest_json import BatchBody, EventsBody, RetrieveBody, requests_of_body
from nann.service.wire.tf_rest import predict_call_of_body

FILES = (
    *(ROOT / "README.md", DOCS / "api.md", DOCS / "errors.md", DOCS / "client.md"),
    ROOT / "client" / "README.md",
)
REPLIES: tuple[type[BaseModel], ...] = (
    replies.RetrieveReplyBody,
    replies.BatchReplyBody,
    replies.ErrorReply,
    replies.UserReply,
    replies.EventsReply,
    replies.DeletedReply,
)
# Histories are shortened to two numbers in the examples of Predict.
TWO_WIDE = ModelMetadata(
    model="nann",
    version=1,
    num_items=9,
    history_length=1,
    input_dim=2,
    item_id_type="int",
    user_id_type="int",
    profiles=(),
)
HEALTH = {"status", "models", "impaired_models"}
ELLIPSIS = re.compile(r",?\s*(…|\.\.\.)")


def _json_examples() -> list[Any]:
    """(file, value) of every JSON block, every body that a curl command sends."""
    found = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        bodies = [block.text for block in code_blocks(text) if block.language in ("json", "jsonc")]
        for words in command_lines(text):
            bodies += [body for flag, body in pairwise(words) if flag in ("-d", "--data")]
        found += [pytest.param(body, id=f"{path.name}-{n}") for n, body in enumerate(bodies)]
    return found


def _is(model: type[BaseModel], value: Any) -> bool:
    """Whether `value` is a message of `model` with nothing besides."""
    try:
        parsed = model.model_validate(value)
    except ValidationError:
        return False
    return bool(parsed.model_dump(exclude_unset=True) == value)


def test_there_are_examples() -> None:
    assert len(_json_examples()) > 10


@pytest.mark.parametrize("body", _json_examples())
def test_a_json_example_is_a_request_or_a_reply(body: str) -> None:
    value = json.loads(ELLIPSIS.sub("", body))
    if any(_is(model, value) for model in REPLIES) or set(value) == HEALTH:
        if "error" in value:
            assert value["error"]["code"] in {row.code for row in ERROR_TABLE.values()}
        return
    if set(value) == {"models"}:
        (statuses,) = value["models"].values()
        assert [VersionStatus(**status) for status in statuses]
        return
    if {"inputs", "instances"} & set(value):
        call, _ = predict_call_of_body(value, TWO_WIDE)
        assert call.requests
        return
    if set(value) in ({"outputs"}, {"predictions"}):
        return
    if set(value) == set(EventsBody.model_fields):
        EventsBody.model_validate(value)
        return
    requests, _ = requests_of_body(value)
    for request in requests:
        subjects = [request.user_id, request.history, request.comm_seq]
        assert sum(subject is not None for subject in subjects) == 1
        search_params(
            request.params,
            request.profile,
            profiles={"fast": SearchParams(), "balanced": SearchParams(), "exact": SearchParams()},
            default=SearchParams(),
            settings=Settings(repository=ROOT),
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_fields_in_inline_code_exist(path: Path) -> None:
    known = {*RetrieveBody.model_fields, *BatchBody.model_fields}
    for code in inline_code(path.read_text(encoding="utf-8")):
        if match := re.match(r'"(\w+)": ', code):
            assert match[1] in known, code
            if "…" not in code and " / " not in code:
                RetrieveBody.model_validate(json.loads(f"{{{code}}}"))


@pytest.fixture
def engine() -> FakeEngine:
    """It knows every user that an example asks for."""
    engine = FakeEngine()
    for path in FILES:
        for user in re.findall(
            r"(?:user_id\W+(?:pb\.Id\(number=)?|/users/)(\d+)", path.read_text(encoding="utf-8")
        ):
            engine.base[int(user)] = (10, 11, 12)
    return engine


def _programs() -> list[Any]:
    return [
        pytest.param(block.text, id=f"{path.name}-{n}")
        for path in FILES
        for n, block in enumerate(code_blocks(path.read_text(encoding="utf-8")))
        if block.language == "python"
    ]


@pytest.mark.parametrize("program", _programs())
async def test_a_program_runs(
    program: str, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = compile(program, "example", "exec")
    if "tensorflow" in program:
        # tests/integration runs NANN's own client; importing TensorFlow here would take seconds.
        assert set(re.findall(r'(?:inputs|outputs)\["(\w+)"\]', program)) <= {
            *("comm_seq", "level_topn", "top_k", "scores")
        }
        return
    async with Transports(tmp_path, engine).open() as world:
        ports = {"8501": str(world.address[1]), "8500": str(world.grpc_port)}
        replaced = re.sub(r"127\.0\.0\.1:(850[01])", lambda port: f"127.0.0.1:{ports[port[1]]}", program)
        assert replaced != program
        code = compile(replaced, "example", "exec")
        await asyncio.to_thread(exec, code, {"__name__": "example"})
    assert capsys.readouterr().out.strip()


def _curls() -> list[Any]:
    return [
        pytest.param(words, id=f"{path.name}-{n}")
        for path in FILES
        for n, words in enumerate(command_lines(path.read_text(encoding="utf-8")))
        if words[0] == "curl"
    ]


@pytest.mark.parametrize("words", _curls())
async def test_a_curl_command_is_answered(words: list[str], engine: FakeEngine, tmp_path: Path) -> None:
    (url,) = (word for word in words if "://" in word or re.match(r"(localhost|127\.0\.0\.1):", word))
    options = dict(pairwise(words))
    body = options.get("-d", options.get("--data"))
    method = options.get("-X", "GET" if body is None else "POST")
    assert re.search(r":8501\b", url)
    async with Transports(tmp_path, engine).open() as world:
        for header in [word for flag, word in pairwise(words) if flag == "-H"]:
            assert header.lower() == "content-type: application/json"
        response = await world.http.request(
            method,
            re.sub(r"^(http://)?[^/]*:8501", "", url),
            content=body,
            headers={"content-type": "application/json"},
        )
    assert response.status_code == 200, response.text
