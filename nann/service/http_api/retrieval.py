"""POST /retrieve and /users: each route is a conversion, a use case and a conversion."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from nann.service.http_api import docs
from nann.service.http_api.call import Call, Routes
from nann.service.retrieval import RetrievalService
from nann.service.wire.checks import user_id_of_text
from nann.service.wire.rest_json import (
    body_of_reply,
    body_of_results,
    body_of_user,
    events_of_body,
    requests_of_body,
)

__all__ = ["retrieval_router"]


def retrieval_router(service: RetrievalService, routes: Routes) -> APIRouter:
    """The routes that retrieve items and keep users' histories."""
    router = APIRouter()

    @router.post("/retrieve", tags=["retrieval"], **docs.RETRIEVE)
    async def retrieve(request: Request) -> Response:
        """The best k items for one user, or (with `queries`) for several in one call."""
        return await routes.answer(request, "retrieve", retrieve_call, searches=True, reads_body=True)

    async def retrieve_call(call: Call) -> Any:
        requests, is_batch = requests_of_body(call.body)
        call.model = requests[0].model if len({request.model for request in requests}) == 1 else None
        if is_batch:
            return body_of_results(await service.retrieve_many(requests), requests, call.request_id)
        return body_of_reply(await service.retrieve(requests[0]), explain=requests[0].explain)

    @router.post("/users/{user_id:path}/events", tags=["users"], **docs.RECORD_EVENTS)
    async def record_events(request: Request, user_id: str) -> Response:
        """Append what a user has just interacted with to the live history."""

        async def record(call: Call) -> Any:
            user = user_id_of_text(user_id)
            recorded = await service.record_events(user, events_of_body(call.body))
            return {"user_id": user, "recorded": recorded}

        return await routes.answer(request, "record_events", record, reads_body=True)

    @router.get("/users/{user_id:path}", tags=["users"], **docs.GET_USER)
    async def get_user(request: Request, user_id: str, model: str | None = None) -> Response:
        """The history that a retrieval for this user would start from."""

        async def get(call: Call) -> Any:
            call.model = model
            return body_of_user(await service.user(user_id_of_text(user_id), model=model))

        return await routes.answer(request, "get_user", get)

    @router.delete("/users/{user_id:path}", tags=["users"], **docs.DELETE_USER)
    async def delete_user(request: Request, user_id: str) -> Response:
        """Forget a user: the live history and, for good, the model's base history."""

        async def delete(call: Call) -> Any:
            user = user_id_of_text(user_id)
            await service.delete_user(user)
            return {"user_id": user, "deleted": True}

        return await routes.answer(request, "delete_user", delete)

    return router
