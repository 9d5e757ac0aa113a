"""The use cases. Every transport calls these and nothing behind them."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nann.engine.errors import BackendError, InvalidQuery, NotReady, RetrievalError, Unavailable
from nann.engine.types import ItemId, Note, Query, UserId
from nann.service.errors import InternalError
from nann.service.health import Health, HealthState
from nann.service.logs import get_logger
from nann.service.metrics import Metrics
from nann.service.params import result_size, search_params
from nann.service.registry import Registry, ServedVersion
from nann.service.settings import Settings
from nann.service.shadow import ShadowSampler
from nann.service.tracing import RequestSpan, current_request
from nann.service.types import (
    ModelConfig,
    ModelMetadata,
    RetrieveReply,
    RetrieveRequest,
    UserProfile,
    VersionStatus,
)
from nann.service.user_store import UserStore
from nann.service.users import LiveLookup, UserHistories

if TYPE_CHECKING:
    from nann.engine.search_engine import PreparedQuery
    from nann.engine.types import Hits
    from nann.service.batcher import Answer

__all__ = ["RetrievalService"]

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """One request as far as it goes without a lane."""

    served: ServedVersion
    query: Query
    prepared: PreparedQuery
    notes: tuple[Note, ...]
    arrival_s: float
    deadline_s: float


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
        self._users = UserHistories(store, metrics)
        self._settings = settings
        self._health = health
        registry.subscribe(health.lanes_changed)
        self._metrics = metrics
        self._shadow = ShadowSampler(settings, metrics)
        self._clock = clock

    # Retrieval

    def has_room(self, *, ahead: int = 0, unread_s: float = 0.0) -> bool:
        """False when a search would be refused whatever it says: no version that is served has room.

        `ahead` searches have been let in before it that have not asked for theirs yet. For `unread_s` it may
        have been waiting until somebody looked at it.
        """
        served = self._registry.all_served()
        return not served or any(
            version.batcher.has_room(ahead=ahead, unread_s=unread_s) for version in served
        )

    def refuse_unread(self, *, searches: bool, ahead: int = 0, unread_s: float = 0.0) -> None:
        """Raise what a new call would be told whatever it says, so that nobody need read it.

        A call that is not refused here may still be, for what it says. One that `searches` and would not
        have come to wait (a history of unknown items) is refused with the others. `ahead` and
        `unread_s` as in `has_room`.

        Raises:
            NotReady: the server is going away.
            Overloaded: it `searches`, and no version that is served has room for one more query.
        """
        if self._health.state is HealthState.DRAINING:
            raise NotReady("the server is shutting down")
        served = self._registry.all_served() if searches else ()
        if served and not any(other.batcher.has_room(ahead=ahead, unread_s=unread_s) for other in served[1:]):
            served[0].batcher.refuse(ahead=ahead, unread_s=unread_s)

    async def retrieve(self, request: RetrieveRequest, *, deadline_s: float | None = None) -> RetrieveReply:
        """Answer one request, or raise the `RetrievalError` that says why not.

        `deadline_s` is the transport's own deadline (``time.monotonic()`` seconds), None when it
        has none. The earlier of it and ``request.timeout_ms`` holds, the default timeout where
        there is neither: a transport need not look at `timeout_ms` itself.
        """
        arrival_s = self._clock()
        live = await self._users.live(() if request.user_id is None else (request.user_id,))
        deadline_s = self._deadline_s(request, arrival_s, deadline_s)
        chosen = self._registry.served(request.model, version=request.version, label=request.label)
        with chosen.lease() as served:
            asked = await self._prepare(request, live, arrival_s, deadline_s, served)
            if asked.prepared.known_history == 0:
                return await self._popular(asked)
            try:
                answer = await asked.served.batcher.submit(asked.prepared, deadline_s=asked.deadline_s)
            except (BackendError, InternalError) as error:
                _log_failed_search(asked.served, error)
                raise
            return self._reply(asked, answer)

    async def retrieve_many(
        self,
        requests: Sequence[RetrieveRequest],
        *,
        deadline_s: float | None = None,
        on: ServedVersion | None = None,
    ) -> list[RetrieveReply | RetrievalError]:
        """Answer each request on its own: one result a request, in order, an error in place of a reply.

        Equal choices of a model get one version, though it be swapped meanwhile; `on` is a leased
        version that answers all of them.

        The queries wait together, behind those of `retrieve`. Raises `InvalidQuery` for no request or more
        than ``max_queries_per_call``.
        """
        limit = self._settings.max_queries_per_call
        if not 1 <= len(requests) <= limit:
            raise InvalidQuery(f"a call holds 1 to {limit} queries, not {len(requests)}")
        arrival_s = self._clock()
        live = await self._users.live(request.user_id for request in requests if request.user_id is not None)
        replies: dict[int, RetrieveReply | RetrievalError] = {}
        together: defaultdict[tuple[ServedVersion, float], list[tuple[int, _Asked]]] = defaultdict(list)
        choose = self._chooser(on)
        with ExitStack() as leases:
            for position, request in enumerate(requests):
                try:
                    own_deadline_s = self._deadline_s(request, arrival_s, deadline_s)
                    served = leases.enter_context(choose(request).lease())
                    asked = await self._prepare(request, live, arrival_s, own_deadline_s, served)
                    if asked.prepared.known_history == 0:
                        replies[position] = await self._popular(asked)
                    else:
                        together[asked.served, asked.deadline_s].append((position, asked))
                except Exception as error:
                    replies[position] = _alone(error)
            for answered in await asyncio.gather(
                *(self._search_together(served, when_s, some) for (served, when_s), some in together.items())
            ):
                replies |= answered
        return [replies[position] for position in range(len(requests))]

    async def probe(self, model: str, version: int) -> None:
        """Run a small real search on every lane of a version that is in doubt; raises what one raises."""
        with self._registry.served(model, version=version).lease() as served:
            params = served.default_params
            popular = await asyncio.to_thread(served.engine.popular, Query(k=1, params=params, history=()))
            prepared = served.engine.check(Query(k=1, params=params, history=popular.item_ids))
            deadline_s = self._clock() + self._settings.default_timeout_ms / 1e3
            await served.batcher.probe(prepared, deadline_s=deadline_s)

    async def _prepare(
        self,
        request: RetrieveRequest,
        live: LiveLookup,
        arrival_s: float,
        deadline_s: float,
        served: ServedVersion,
    ) -> _Asked:
        """All of a request that needs no lane; whoever asks holds a lease on `served`."""
        query, notes = self._query(request, live, served)
        # An attribute filter or an include list looks at every item: too long for the event loop.
        if query.filter is not None or query.include is not None:
            prepared = await asyncio.to_thread(served.engine.check, query)
        else:
            prepared = served.engine.check(query)
        return _Asked(served, query, prepared, tuple(notes), arrival_s, deadline_s)

    def _chooser(self, on: ServedVersion | None) -> Callable[[RetrieveRequest], ServedVersion]:
        """What says which version answers a request of one call."""

        @functools.cache
        def choose(model: str | None, version: int | None, label: str | None) -> ServedVersion:
            return on or self._registry.served(model, version=version, label=label)

        return lambda request: choose(request.model, request.version, request.label)

    async def _search_together(
        self, served: ServedVersion, deadline_s: float, asked: Sequence[tuple[int, _Asked]]
    ) -> dict[int, RetrieveReply | RetrievalError]:
        """Replies by position to queries of one version and deadline."""
        replies: dict[int, RetrieveReply | RetrievalError] = {}
        try:
            answers: Sequence[Answer[Hits] | Exception] = await served.batcher.submit_many(
                [one.prepared for _, one in asked], deadline_s=deadline_s
            )
        except RetrievalError as error:
            answers = [copy(error) for _ in asked]
        failures = [answer for answer in answers if isinstance(answer, BackendError | InternalError)]
        for failure in {id(failure.__cause__): failure for failure in failures}.values():  # one a batch
            _log_failed_search(served, failure)
        for (position, one), answer in zip(asked, answers, strict=True):
            if isinstance(answer, Exception):
                replies[position] = _alone(answer)
            else:
                replies[position] = self._reply(one, answer)
        return replies

    def _reply(self, asked: _Asked, answer: Answer[Hits]) -> RetrieveReply:
        hits = answer.result
        self._metrics.observe_search(n_scored=hits.n_scored, steps=hits.steps)
        self._shadow.consider(asked.served, asked.query, asked.prepared, hits)
        if (span := current_request()) is not None:
            _trace(span, asked, answer)
        return RetrieveReply(
            hits,
            asked.served.name,
            asked.served.version,
            {
                "queue": answer.queue_s * 1e3,
                "search": answer.search_s * 1e3,
                "total": (self._clock() - asked.arrival_s) * 1e3,
            },
            (*hits.notes, *asked.notes),
            {"batch_size": answer.batch_size, "dispatched_by": answer.reason},
        )

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
        notes: list[Note] = []
        history: Sequence[ItemId] | None = request.history
        if request.user_id is not None:
            history = self._history_of(request.user_id, live, served, notes)
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

    def _history_of(
        self, user_id: UserId, live: LiveLookup, served: ServedVersion, notes: list[Note]
    ) -> Sequence[ItemId]:
        """A user's history; without the live events, and a note of it, while the store does not answer."""
        try:
            return self._users.history(user_id, live(user_id), served).history
        except Unavailable:
            base = self._users.base(user_id, served)
            # Whoever has no base history may still be known to the store: an error, and not UnknownUser.
            if base is None or self._settings.user_store_failure == "error":
                raise
            notes.append(
                Note("live_history_missing", "the user store does not answer: the model's own history", 0)
            )
            return base

    def _check_shape(self, request: RetrieveRequest) -> None:
        who = [name for name in ("user_id", "history", "comm_seq") if getattr(request, name) is not None]
        if len(who) != 1:
            named = " and ".join(who) or "none"
            raise InvalidQuery(f"give exactly one of user_id, history and comm_seq, not {named}")
        for name in ("history", "include_ids", "exclude_ids"):
            length = len(getattr(request, name) or ())
            if length > self._settings.max_ids:
                raise InvalidQuery(f"{name} holds {length} ids, more than {self._settings.max_ids}")

    async def _popular(self, asked: _Asked) -> RetrieveReply:
        """The reply to a history without one known item."""
        if self._settings.empty_history == "error":
            raise InvalidQuery("the history holds no item that this model knows")
        hits = await asyncio.to_thread(asked.served.engine.popular, asked.query)
        empty = Note("empty_history", "no item of the history is known", len(asked.query.history or ()))
        timings_ms = {"total": (self._clock() - asked.arrival_s) * 1e3}
        notes = (*hits.notes, *asked.notes, empty)
        return RetrieveReply(hits, asked.served.name, asked.served.version, timings_ms, notes)

    # Users

    async def record_events(self, user_id: UserId, events: Sequence[ItemId]) -> int:
        """Add item ids (oldest first) to a user's live history; returns how many, once they are durable.

        Raises `InvalidQuery` for no event, too many, or an id that no served model could have.
        """
        if not 1 <= len(events) <= self._settings.max_ids:
            raise InvalidQuery(f"give 1 to {self._settings.max_ids} events, not {len(events)}")
        with self._all_leased() as served:
            await self._users.record(user_id, events, served)
        return len(events)

    async def user(self, user_id: UserId, *, model: str | None = None) -> UserProfile:
        """What is known of a user; raises `UnknownUser`. The base history is that of `model`."""
        with self._registry.served(model).lease() as served:
            live = await self._users.live([user_id])
            return self._users.history(user_id, live(user_id), served)

    async def delete_user(self, user_id: UserId) -> None:
        """Forget a user: live events and, for good, the artifact's base history. Raises `UnknownUser`."""
        with self._all_leased() as served:
            await self._users.delete(user_id, served)

    @contextmanager
    def _all_leased(self) -> Iterator[Sequence[ServedVersion]]:
        served = self._registry.all_served()
        if not served:
            raise NotReady("no model has been loaded yet")
        with ExitStack() as leases:
            yield [leases.enter_context(version.lease()) for version in served]

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

    def leased(
        self, model: str, *, version: int | None = None, label: str | None = None
    ) -> AbstractContextManager[ServedVersion]:
        """One version for a whole call, whatever is swapped meanwhile; raises as `metadata` does."""
        return self._registry.served(model, version=version, label=label).lease()

    async def rescan_models(self) -> None:
        """Look for versions now; returns when they are served, or have failed (their status says it).

        Raises `Unavailable` when the repository cannot be read, `NotReady` during a shutdown.
        """
        await self._registry.rescan()

    async def reload_models(self, configs: Sequence[ModelConfig]) -> None:
        """Serve these models from now on, and no others; raises as `Registry.reload` does."""
        await self._registry.reload(configs)


def _alone(error: Exception) -> RetrievalError:
    """What one query of a batch call gets in place of a reply."""
    if isinstance(error, RetrievalError):
        return error
    log.error("a query of a batch call failed", exc_info=error)
    failure = InternalError(str(error))
    failure.__cause__ = error
    return failure


def _trace(span: RequestSpan, asked: _Asked, answer: Answer[Hits]) -> None:
    """What the batcher and the engine say of one query, as children of its request."""
    span.record("queue", answer.queue_s, ago_s=answer.search_s)
    span.record(
        "search",
        answer.search_s,
        model=asked.served.name,
        version=asked.served.version,
        policy=asked.query.params.policy,
        n_scored=answer.result.n_scored,
        steps=answer.result.steps,
        batch_size=answer.batch_size,
        dispatched_by=answer.reason,
    )


def _log_failed_search(served: ServedVersion, error: Exception) -> None:
    log.error("search failed", model=served.name, version=served.version, exc_info=error)
