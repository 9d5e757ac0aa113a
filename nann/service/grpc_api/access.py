"""Who may call which method: refused before its message is read."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from typing_extensions import override

from nann.engine.errors import RetrievalError
from nann.service.access import Access, Role, bearer_key
from nann.service.errors import error_row
from nann.service.grpc_api import native, tensorflow_serving
from nann.service.grpc_api.call import ERROR_CODE_KEY, REQUEST_ID_KEY
from nann.service.grpc_api.health import HEALTH_SERVICE
from nann.service.logs import bind_caller
from nann.service.metrics import Metrics
from nann.service.wire.checks import bounded_message, request_id_of

__all__ = ["ROLES", "AccessInterceptor", "role_of"]

# v1alpha and v1
_REFLECTION: Final = "/grpc.reflection."

ROLES: Final[dict[str, Role]] = {
    f"/{service}/{method}": role
    for service, methods in {
        native.SERVICE_NAME: {
            "Retrieve": Role.READ,
            "BatchRetrieve": Role.READ,
            "GetUser": Role.READ,
            "RecordEvents": Role.WRITE,
            "DeleteUser": Role.WRITE,
        },
        tensorflow_serving.PREDICTION_SERVICE: {"Predict": Role.READ, "GetModelMetadata": Role.READ},
        tensorflow_serving.MODEL_SERVICE: {
            "GetModelStatus": Role.READ,
            "HandleReloadConfigRequest": Role.ADMIN,
        },
    }.items()
    for method, role in methods.items()
}


def role_of(path: str, access: Access) -> Role | None:
    """What a call of `path` needs; None: nothing. One that nobody has thought of needs the highest."""
    if path.startswith(f"/{HEALTH_SERVICE}/"):
        return None
    if path.startswith(_REFLECTION):
        return None if access.open_docs else Role.READ
    return ROLES.get(path, Role.ADMIN)


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # untyped base
    """Lets through what the caller's key allows."""

    def __init__(self, access: Access, metrics: Metrics) -> None:
        self._access = access
        self._metrics = metrics

    @override
    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The method's own handler, or one that refuses."""
        needed = role_of(handler_call_details.method, self._access)
        if needed is None:
            return await continuation(handler_call_details)
        start_s = time.perf_counter()
        sent = dict(handler_call_details.invocation_metadata or ())
        try:
            caller = self._access.allow(
                bearer_key(_text(sent.get("authorization")), _text(sent.get("x-api-key"))), needed
            )
        except RetrievalError as error:
            self._metrics.observe_request(
                api="grpc",
                method="refused",
                model=None,
                code=error_row(error).code,
                duration_s=time.perf_counter() - start_s,
            )
            return _refusal(error, request_id_of(_text(sent.get(REQUEST_ID_KEY))))
        # Every call has a task of its own, so this ends with it.
        bind_caller(caller)
        return await continuation(handler_call_details)


def _refusal(error: RetrievalError, request_id: str) -> grpc.RpcMethodHandler:
    row = error_row(error)

    async def refuse(_messages: Any, context: grpc.aio.ServicerContext) -> None:
        trailer = ((REQUEST_ID_KEY, request_id), (ERROR_CODE_KEY, row.code))
        await context.abort(grpc.StatusCode[row.grpc_code], bounded_message(error), trailer)

    # A stream, though most methods are not: for one message the server would wait.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _text(value: str | bytes | None) -> str | None:
    return value if value is None or isinstance(value, str) else value.decode("utf-8", "replace")
