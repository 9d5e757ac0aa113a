"""nann.retrieval.v1.RetrievalService: each method is a conversion, a use case and a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import grpc

from nann.service.grpc_api.call import Call, Method
from nann.service.pb import retrieval_pb2 as pb
from nann.service.retrieval import RetrievalService
from nann.service.wire.native_proto import (
    batch_response,
    id_of_proto,
    ids_of_proto,
    request_of_proto,
    response_of_reply,
    user_response,
)

__all__ = ["SERVICE_NAME", "NativeApi"]

SERVICE_NAME: Final[str] = pb.DESCRIPTOR.services_by_name["RetrievalService"].full_name
_CODE_NUMBERS: Final = {status.name: status.value[0] for status in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class NativeApi:
    """The methods of `RetrievalService`, by name in `methods`."""

    service: RetrievalService

    def methods(self) -> dict[str, tuple[type[Any], Method]]:
        """Method name -> (request class, coroutine)."""
        return {
            "Retrieve": (pb.RetrieveRequest, self.retrieve),
            "BatchRetrieve": (pb.BatchRetrieveRequest, self.batch_retrieve),
            "RecordEvents": (pb.RecordEventsRequest, self.record_events),
            "GetUser": (pb.GetUserRequest, self.get_user),
            "DeleteUser": (pb.DeleteUserRequest, self.delete_user),
        }

    async def retrieve(self, call: Call) -> pb.RetrieveResponse:
        """The best items for one user."""
        call.model = call.message.model or None
        request = request_of_proto(call.message)
        reply = await self.service.retrieve(request, deadline_s=call.deadline_s)
        return response_of_reply(reply, explain=request.explain)

    async def batch_retrieve(self, call: Call) -> pb.BatchRetrieveResponse:
        """The best items for each of several users."""
        requests = [request_of_proto(query) for query in call.message.queries]
        call.model = requests[0].model if len({request.model for request in requests}) == 1 else None
        results = await self.service.retrieve_many(requests, deadline_s=call.deadline_s)
        return batch_response(results, requests, _CODE_NUMBERS)

    async def record_events(self, call: Call) -> pb.RecordEventsResponse:
        """Append to a user's live history."""
        user_id = id_of_proto(call.message.user_id, "user_id")
        item_ids = ids_of_proto(call.message.item_ids, "item_ids")
        return pb.RecordEventsResponse(recorded=await self.service.record_events(user_id, item_ids))

    async def get_user(self, call: Call) -> pb.GetUserResponse:
        """A user's history."""
        call.model = call.message.model or None
        user_id = id_of_proto(call.message.user_id, "user_id")
        return user_response(await self.service.user(user_id, model=call.model))

    async def delete_user(self, call: Call) -> pb.DeleteUserResponse:
        """Forget a user."""
        await self.service.delete_user(id_of_proto(call.message.user_id, "user_id"))
        return pb.DeleteUserResponse()
