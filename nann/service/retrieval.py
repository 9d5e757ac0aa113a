"""The use cases. Every transport calls these and nothing behind them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nann.engine.errors import BackendError, InvalidQuery, NotReady, RetrievalError
from nann.engine.types import ItemId, Note, Query, UserId
from nann.service.errors import InternalError
from nann.service.health import Health
from nann.service.logs import get_logger
from nann.service.metrics import Metrics
from nann.service.params import result_size, search_params
from nann.service.registry import Registry, ServedVersion
from nann.service.settings import Settings
from nann.service.types import ModelMetadata, RetrieveReply, RetrieveRequest, UserProfile, VersionStatus
from nann.service.user_store import UserStore
from nann.service.users import LiveLookup, UserHistories

if TYPE_CHECKING:
    from nann.engine.search_engine import PreparedQuery
    from nann.engine.types import Hits
    from nann.service.batcher import Answer

__all__ = ["RetrievalService"]

log = get_logger(__name__)


class RetrievalService:
    """Answers retrievals and keeps users' live histories. Lives on one event loop."""

    def __init__(
        self,
        registry: Registry,
        store: UserStore,
        settings: Settings,
        *,
        health: Health,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._users = UserHistories(store)
        self._settings = settings
        self._health = health
        self._metrics = metrics
        self._clock = clock

    # Retrieval

    async def retrieve(self, request: RetrieveRequest, *, deadline_s: float | None = None) -> RetrieveReply:
        """Answer one request, or raise the `RetrievalError` that says why not.

        `deadline_s` is the transport's own deadline (``time.monotonic()`` seconds), None when it
        has none. The earlier of it and ``request.timeout_ms`` holds, the default timeout where
        there is neither: a transport need not look at `timeout_ms` itself.
        """
        arrival_s = self._clock()
        live = await self._users.live([] if request.user_id is None else [request.user_id])
        return await self._answer(request, live, arrival_s, deadline_s)

    async def retrieve_many(
        self, requests: Sequence[RetrieveRequest], *, deadline_s: float | None = None
    ) -> list[RetrieveReply | RetrievalError]:
        """Answer each request on its own: one result a request, in order, an error in place of a reply.

        Raises `InvalidQuery` for no request or more than ``max_queries_per_call``.
        """
        limit = self._settings.max_queries_per_call
        if not 1 <= len(requests) <= limit:
            raise InvalidQuery(f"a call holds 1 to {limit} queries, not {len(requests)}")
        arrival_s = self._clock()
        live = await self._users.live(request.user_id for request in requests if request.user_id is not None)

        async def answer_alone(request: RetrieveRequest) -> RetrieveReply | RetrievalError:
            try:
                return await self._answer(request, live, arrival_s, deadline_s)
            except RetrievalError as error:
                return error
            except Exception as error:
                log.exception("a query of a batch call failed")
                failure = InternalError(str(error))
                failure.__cause__ = error
                return failure

        return list(await asyncio.gather(*(answer_alone(request) for request in requests)))

    async def probe(self, model: str) -> None:
        """Run a small real search of `model`; raises what it raises. Readiness follows its outcome."""
        with self._registry.served(model).lease() as served:
            params = served.default_params
            popular = await asyncio.to_thread(served.engine.popular, Query(k=1, params=params, history=()))
            prepared = served.engine.check(Query(k=1, params=params, history=popular.item_ids))
            await self._search(served, prepared, self._clock() + self._settings.default_timeout_ms / 1e3)

    async def _answer(
        self, request: RetrieveRequest, live: LiveLookup, arrival_s: float, deadline_s: float | None
    ) -> RetrieveReply:
        deadline_s = self._deadline_s(request, arrival_s, deadline_s)
        version = self._registry.served(request.model, version=request.version, label=request.label)
        with version.lease() as served:
            query, notes = self._query(request, live, served)
            # An attribute filter or an include list looks at every item: too long for the event loop.
            if query.filter is not None or query.include is not None:
                prepared = await asyncio.to_thread(served.engine.check, query)
            else:
                prepared = served.engine.check(query)
            if prepared.known_history == 0:
                hits, timings_ms = await self._popular(served, query), {}
                notes.append(
                    Note("empty_history", "no item of the history is known", len(query.history or ()))
                )
            else:
                answer = await self._search(served, prepared, deadline_s)
                hits = answer.result
                timings_ms = {"queue": answer.queue_s * 1e3, "search": answer.search_s * 1e3}
            timings_ms["total"] = (self._clock() - arrival_s) * 1e3
            return RetrieveReply(hits, served.name, served.version, timings_ms, (*hits.notes, *notes))

    def _deadline_s(self, request: RetrieveRequest, arrival_s: float, deadline_s: float | None) -> float:
        timeout_ms = request.timeout_ms
        if timeout_ms is None:
            if deadline_s is not None:
                return deadline_s
            timeout_ms = self._settings.default_timeout_ms
        if not (math.isfinite(timeout_ms) and timeout_ms > 0):
            raise InvalidQuery(f"timeout_ms must be a positive number, not {timeout_ms}")
        own_s = arrival_s + timeout_ms / 1e3
        return own_s if deadline_s is None else min(own_s, deadline_s)

    def _query(
        self, request: RetrieveRequest, live: LiveLookup, served: ServedVersion
    ) -> tuple[Query, list[Note]]:
        """The engine's query for a request, and what the caller should know about how it was read."""
        self._check_shape(request)
        params = search_params(
            request.params,
            request.profile,
            profiles=served.profiles,
            default=served.default_params,
            settings=self._settings,
        )
        history: Sequence[ItemId] | None = request.history
        if request.user_id is not None:
            history = self._users.history(request.user_id, live(request.user_id), served).history
        notes: list[Note] = []
        exclude_seen = request.exclude_seen
        if exclude_seen and history is None:
            notes.append(Note("seen_unknown", "comm_seq names no items, so none was left out as seen"))
        if exclude_seen is None:
            exclude_seen = self._settings.exclude_seen_default
        query = Query(
            k=result_size(request.k, params, max_k=self._settings.max_k),
            params=params,
            history=history,
            comm_seq=request.comm_seq,
            seen=(history or ()) if exclude_seen else (),
            include=request.include_ids,
            exclude=request.exclude_ids,
            filter=request.filter,
            strict=request.strict,
            with_attributes=request.with_attributes,
        )
        return query, notes

    def _check_shape(self, request: RetrieveRequest) -> None:
        who = [name for name in ("user_id", "history", "comm_seq") if getattr(request, name) is not None]
        if len(who) != 1:
            named = " and ".join(who) or "none"
            raise InvalidQuery(f"give exactly one of user_id, history and comm_seq, not {named}")
        for name in ("history", "include_ids", "exclude_ids"):
            length = len(getattr(request, name) or ())
            if length > self._settings.max_ids:
                raise InvalidQuery(f"{name} holds {length} ids, more than {self._settings.max_ids}")

    async def _search(
        self, served: ServedVersion, prepared: PreparedQuery, deadline_s: float
    ) -> Answer[Hits]:
        try:
            answer = await served.batcher.submit(prepared, deadline_s=deadline_s)
        except (BackendError, InternalError) as error:
            log.error("search failed", model=served.name, version=served.version, exc_info=error)
            self._health.search_failed(served.name)
            raise
        self._health.search_succeeded(served.name)
        self._metrics.observe_search(n_scored=answer.result.n_scored, steps=answer.result.steps)
        return answer

    async def _popular(self, served: ServedVersion, query: Query) -> Hits:
        if self._settings.empty_history == "error":
            raise InvalidQuery("the history holds no item that this model knows")
        return await asyncio.to_thread(served.engine.popular, query)

    # Users

    async def record_events(self, user_id: UserId, events: Sequence[ItemId]) -> int:
        """Add item ids (oldest first) to a user's live history; returns how many, once they are durable.

        Raises `InvalidQuery` for no event, too many, or an id that no served model could have.
        """
        if not 1 <= len(events) <= self._settings.max_ids:
            raise InvalidQuery(f"give 1 to {self._settings.max_ids} events, not {len(events)}")
        await self._users.record(user_id, events, self._all_served())
        return len(events)

    async def user(self, user_id: UserId, *, model: str | None = None) -> UserProfile:
        """What is known of a user; raises `UnknownUser`. The base history is that of `model`."""
        with self._registry.served(model).lease() as served:
            live = await self._users.live([user_id])
            return self._users.history(user_id, live(user_id), served)

    async def delete_user(self, user_id: UserId) -> None:
        """Forget a user: live events and, for good, the artifact's base history. Raises `UnknownUser`."""
        await self._users.delete(user_id, self._all_served())

    def _all_served(self) -> Sequence[ServedVersion]:
        served = self._registry.all_served()
        if not served:
            raise NotReady("no model has been loaded yet")
        return served

    # Models

    @property
    def default_model(self) -> str:
        """The model of a request that names none; raises `InvalidQuery` when several are served."""
        return self._registry.default_model

    def models(self) -> tuple[str, ...]:
        """Names of all models of the repository, loading ones too."""
        return self._registry.models()

    def version_status(
        self, model: str, *, version: int | None = None, label: str | None = None
    ) -> list[VersionStatus]:
        """State of every version of `model`, newest first, or of the one named.

        Raises `UnknownModel`, `UnknownVersion`, `UnknownLabel`; `NotReady` before the repository was read.
        """
        return self._registry.status(model, version=version, label=label)

    def metadata(
        self, model: str | None = None, *, version: int | None = None, label: str | None = None
    ) -> ModelMetadata:
        """Shape of a served version; raises as `retrieve` does for an unknown or loading one."""
        return self._registry.served(model, version=version, label=label).metadata
