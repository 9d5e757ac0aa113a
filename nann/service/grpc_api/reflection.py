"""gRPC reflection: what services there are, for tools such as grpcurl.

TensorFlow's declarations are not in the default pool, which is all that reflection can show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from nann.service.grpc_api.call import or_invalid_argument

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

__all__ = ["reflection_handler"]


def reflection_handler(services: Iterable[str]) -> grpc.GenericRpcHandler:
    """The handler that tells of `services`; the library's own answers malformed messages with UNKNOWN."""
    servicer = reflection.aio.ReflectionServicer((*services, reflection.SERVICE_NAME))

    async def tell(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async def requests() -> AsyncIterator[Any]:
            async for raw in messages:
                yield await or_invalid_argument(context, reflection_pb2.ServerReflectionRequest, raw)

        async for response in servicer.ServerReflectionInfo(requests(), context):
            yield response

    return grpc.method_handlers_generic_handler(
        reflection.SERVICE_NAME,
        {
            "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
                tell, response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString
            )
        },
    )
