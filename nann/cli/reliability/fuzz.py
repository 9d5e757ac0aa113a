"""Hostile requests to a running server: whatever comes, it answers, and never with a failure of its own."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import grpc
import numpy as np
import orjson
import uvloop
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from nann.cli.benchmark_http import HttpClient
from nann.cli.reliability.inputs import Hostile, ProtoInputs, RestInputs
from nann.cli.server_process import running_server
from nann.offline.progress import Progress, Stage
from nann.service.pb import retrieval_pb2 as pb
from nann.service.wire import tf_messages
from nann.service.wire.tensors import decode_tensor, encode_tensor

__all__ = ["FuzzResult", "fuzz_server", "measure_fuzz"]

# A query's own default deadline is 10 s; what takes longer hangs.
_HANG_S: Final = 20.0
_IN_FLIGHT: Final = 16
# Shares of the inputs; what is left of one goes to TensorProto decoding.
_REST, _MALFORMED_HTTP, _GRPC = 0.5, 0.05, 0.35
# What no answer may hold: a trace, or a path of the server's.
_LEAKS: Final = (b"Traceback", b'File "', b".py", b"site-packages", b"/home/", b"/usr/", b"/tmp/", b"/root/")
_WIDTHS: Final = (100, 200, 200, 200, 200, 5)
_KEPT_FAILURES: Final = 10


@dataclass(slots=True)
class FuzzResult:
    """What came back: how often each answer, and what must never come."""

    requests: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    n_failures: int = 0
    failures: list[str] = field(default_factory=list)
    alive: bool = False
    memory_mib: tuple[int, int] = (0, 0)
    log_errors: int = 0

    @property
    def kept(self) -> bool:
        return self.alive and not self.failures and not self.log_errors

    def failed(self, what: str, sent: bytes) -> None:
        """Note a broken promise, with what broke it."""
        self.n_failures += 1
        if len(self.failures) < _KEPT_FAILURES:
            self.failures.append(f"{what} after {sent[:300]!r}")

    def words(self) -> str:
        """The result in one sentence."""
        counted = ", ".join(f"{answer} {count:,}" for answer, count in sorted(self.answers.items()))
        return (
            f"{self.requests:,} inputs ({counted}): {self.n_failures:,} failures, "
            f"{self.log_errors} errors in the log, server {'ready' if self.alive else 'GONE'} at the end; "
            f"memory {self.memory_mib[0]:,} MiB before, {self.memory_mib[1]:,} MiB after"
            + "".join(f"; {failure}" for failure in self.failures)
        )


def measure_fuzz(repository: Path, *, requests: int, seed: int) -> FuzzResult:
    """Fuzz a server of its own on `repository`; raises ServerError when it does not start."""
    with tempfile.TemporaryDirectory(prefix="nann-reliability-") as place, Progress() as progress:
        log_path = Path(place, "server.log")
        with (
            progress.stage("fuzz", total=requests, unit="requests") as stage,
            running_server(repository, log_path=log_path, flags=["--log-format", "json"]) as server,
        ):
            grpc_target = urlsplit(server.grpc_url).netloc
            result = uvloop.run(
                fuzz_server(server.rest_url, grpc_target, requests=requests, seed=seed, stage=stage)
            )
        lines = [line for line in log_path.read_bytes().splitlines() if _is_error(line)]
        result.log_errors = len(lines)
        for line in lines[:3]:
            result.failed("in the log: " + line.decode(errors="replace")[:2000], b"")
        return result


def _is_error(line: bytes) -> bool:
    return b'"level": "error"' in line or b'"level": "critical"' in line or b"Traceback" in line


async def fuzz_server(
    rest_url: str, grpc_target: str, *, requests: int, seed: int, stage: Stage | None = None
) -> FuzzResult:
    """Send `requests` hostile inputs to both ports of one server. It should keep its users in memory."""
    async with grpc.aio.insecure_channel(grpc_target) as channel:
        client = HttpClient(rest_url, timeout_s=_HANG_S)
        fuzz = _Fuzz(client, rest_url, channel, Hostile(random.Random(seed)))
        try:
            await fuzz.prepare()
            before_mib = await _resident_mib(client)
            await fuzz.send(requests, stage)
            fuzz.result.alive = (await client.get("/readyz"))[0] == 200
            fuzz.result.memory_mib = (before_mib, await _resident_mib(client))
        except OSError as error:
            fuzz.result.failed(f"the server is gone: {error!r}", b"")
        finally:
            await client.close()
        return fuzz.result


class _Fuzz:
    def __init__(self, client: HttpClient, url: str, channel: grpc.aio.Channel, hostile: Hostile) -> None:
        self._client = client
        self._address = urlsplit(url)
        self._channel = channel
        self._hostile = hostile
        self._protos = ProtoInputs(hostile)
        self._rest: RestInputs
        self._width = 1
        self._methods = _methods()
        self.result = FuzzResult()

    async def prepare(self) -> None:
        """Read what the server says of itself: its OpenAPI document, and the width of a history."""
        document = orjson.loads((await self._client.get("/openapi.json"))[1])
        model = orjson.loads((await self._client.get("/healthz"))[1])["models"][0]
        metadata = orjson.loads((await self._client.get(f"/v1/models/{model}/metadata"))[1])
        signatures = metadata["metadata"]["signature_def"]["signature_def"]
        shape = signatures["serving_default"]["inputs"]["comm_seq"]["tensor_shape"]["dim"]
        self._width = int(shape[1]["size"])
        self._rest = RestInputs(document, self._hostile, row_width=self._width)

    async def send(self, requests: int, stage: Stage | None) -> None:
        async def some() -> None:
            while self.result.requests < requests:
                self.result.requests += 1
                if stage is not None:
                    stage.advance()
                await self._one()

        await asyncio.gather(*(some() for _ in range(_IN_FLIGHT)))

    async def _one(self) -> None:
        draw = self._hostile.rng.random()
        if draw < _REST:
            await self._http()
        elif draw < _REST + _MALFORMED_HTTP:
            await self._malformed_http()
        elif draw < _REST + _MALFORMED_HTTP + _GRPC:
            await self._grpc()
        else:
            self._tensor()

    async def _http(self) -> None:
        sent = self._rest.request()
        try:
            status, body = await self._client.exchange(sent)
        except (OSError, ValueError) as error:  # TimeoutError, too
            self.result.failed(f"REST: {error!r}", sent)
            return
        self.result.answers[f"REST {status}"] += 1
        self._check(status, body, sent)

    def _check(self, status: int, body: bytes, sent: bytes) -> None:
        if status >= 500 and status not in (501, 503, 504):
            self.result.failed(f"REST {status}: {body[:500]!r}", sent)
        elif status >= 400 and b'"error"' not in body:
            self.result.failed(f"REST {status} without an error body: {body[:500]!r}", sent)
        elif status >= 400 and any(leak in body and leak not in sent for leak in _LEAKS):
            self.result.failed(f"REST {status} tells too much: {body[:500]!r}", sent)

    async def _malformed_http(self) -> None:
        sent = self._rest.malformed()
        try:
            answer = await asyncio.wait_for(self._raw(sent), _HANG_S)
        except (OSError, asyncio.TimeoutError) as error:
            if not isinstance(error, ConnectionError):
                self.result.failed(f"malformed HTTP: {error!r}", sent)
            return
        status = int(answer[9:12]) if answer[:5] == b"HTTP/" else 0
        self.result.answers[f"HTTP {status or 'closed'}"] += 1
        if status:
            self._check(status, answer, sent)

    async def _raw(self, sent: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        try:
            writer.write(sent)
            writer.write_eof()
            return await reader.read()  # the server closes what is half closed
        finally:
            writer.close()

    async def _grpc(self) -> None:
        path, request_class = self._hostile.rng.choice(self._methods)
        if request_class is tf_messages.PredictRequest and self._hostile.chance(0.7):
            sent = self._predict()
        else:
            sent = self._protos.content(request_class)
        call = self._channel.unary_unary(path)(sent, timeout=_HANG_S)
        code, details, trailer = await _outcome(call)
        self.result.answers[f"gRPC {code}"] += 1
        server_said = any(key in ("nann-error-code", "x-request-id") for key, _ in trailer)
        if code in ("INTERNAL", "UNKNOWN", "DATA_LOSS") or (code == "UNAVAILABLE" and not server_said):
            self.result.failed(f"{path} {code}: {details}", sent)
        elif code == "DEADLINE_EXCEEDED" and not server_said:
            self.result.failed(f"{path} hangs", sent)
        elif any(leak.decode() in details and leak not in sent for leak in _LEAKS):
            self.result.failed(f"{path} {code} tells too much: {details}", sent)

    def _predict(self) -> bytes:
        """A good Predict request with one or two parts made hostile."""
        hostile, rng = self._hostile, self._hostile.rng
        message = tf_messages.PredictRequest()
        message.model_spec.name = "nann"
        encode_tensor(np.zeros((rng.choice((1, 1, 2)), self._width), np.float16), message.inputs["comm_seq"])
        encode_tensor(np.array(_WIDTHS, np.int32), message.inputs["level_topn"])
        for tensor in message.inputs.values():
            if hostile.chance(0.5):
                self._protos.fill(tensor, 3)
        if hostile.chance(0.2):
            self._protos.fill(message.model_spec, 0)
        content: bytes = message.SerializeToString()
        return hostile.damaged(content) if hostile.chance(0.1) else content

    def _tensor(self) -> None:
        """Decoding in this process: an array of the stated shape, or InvalidQuery."""
        from nann.engine.errors import InvalidQuery

        proto = self._protos.message(tf_messages.TensorProto)
        if self._hostile.chance(0.5):
            del proto.tensor_shape.dim[:]
            for _ in range(self._hostile.rng.randrange(4)):
                proto.tensor_shape.dim.add(size=self._hostile.rng.choice((0, 1, 2, 3, 6)))
        try:
            array = decode_tensor(proto, "x")
            shape = tuple(dim.size for dim in proto.tensor_shape.dim)
            self.result.answers["TensorProto decoded"] += 1
            if array.shape != shape:
                self.result.failed(f"TensorProto: shape {array.shape}", proto.SerializeToString())
        except InvalidQuery:
            self.result.answers["TensorProto refused"] += 1
        except Exception as error:
            self.result.failed(f"TensorProto: {error!r}", proto.SerializeToString())


def _methods() -> list[tuple[str, Any]]:
    """Every method that takes one message, but the one that would change what is served."""
    found = []
    for service in (pb.DESCRIPTOR.services_by_name["RetrievalService"],):
        for method in service.methods:
            found.append((f"/{service.full_name}/{method.name}", getattr(pb, method.input_type.name)))
    for name in ("tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"):
        for method_name, (request_class, _) in tf_messages.service_methods(name).items():
            if request_class is not tf_messages.ReloadConfigRequest:
                found.append((f"/{name}/{method_name}", request_class))
    found.append(("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest))
    # A stream; asked for one answer, as good as one message.
    found.append((f"/{reflection.SERVICE_NAME}/ServerReflectionInfo", reflection_pb2.ServerReflectionRequest))
    return found


async def _outcome(call: Any) -> tuple[str, str, Any]:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or "", error.trailing_metadata() or ()
    return "OK", "", ()


async def _resident_mib(client: HttpClient) -> int:
    text = (await client.get("/metrics"))[1].decode()
    for line in text.splitlines():
        if line.startswith("process_resident_memory_bytes "):
            return round(float(line.split()[1]) / 2**20)
    return 0
