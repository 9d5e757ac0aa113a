"""The server process: composes settings, models, store and both transports on one event loop.

start    sockets open, /livez answers, /readyz is 503       a startup probe needs no guess
load     every model read, verified and warmed on a thread
ready    one log line with both addresses; new versions are looked for, loaded and swapped in
drain    (SIGTERM, SIGINT) not ready, and new requests are told so -> (linger) accept no connections ->
         finish what was accepted -> exit 0
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from nann.engine.errors import ArtifactError, RetrievalError
from nann.service.access import open_access
from nann.service.allocator import keep_large_blocks_apart
from nann.service.exposure import warn_of_exposure
from nann.service.grpc_api.server import GrpcServer, create_server
from nann.service.health import Health, keep_recovering
from nann.service.http_api.server import HttpServer, create_http_server
from nann.service.logs import configure_logging, get_logger
from nann.service.metrics import Metrics
from nann.service.registry import LoadEngine, Registry
from nann.service.retrieval import RetrievalService
from nann.service.settings import Settings, SettingsError
from nann.service.tls import open_tls
from nann.service.tracing import Tracing, open_tracing
from nann.service.user_store import UserStore, open_user_store

__all__ = ["Application", "Exit", "serve"]

# A lane comes back from native code some 50 times a batch, and each time waits until the event loop has run
# all that is ready, or for this long; by default for 5 ms. Throughput rose by 5 to 10 %.
_SWITCH_INTERVAL_S = 0.0005
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Exit:
    """How the process ends; `threads_left` when a thread is still in native code and must not be joined."""

    code: int
    threads_left: bool = False


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code: 0, or 1 with one line that says why.

    Ends the process itself when a search (or a load) that will not end would otherwise keep it.
    """
    configure_logging(level=settings.log_level, log_format=settings.log_format)
    keep_large_blocks_apart()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    log.info("settings", **settings.printable())
    outcome = _run_on_loop(Application(settings).run())
    if outcome.threads_left:
        logging.shutdown()
        os._exit(outcome.code)
    return outcome.code


def _run_on_loop(main: Coroutine[Any, Any, Exit]) -> Exit:
    try:
        import uvloop
    except ImportError:  # a platform without it
        return asyncio.run(main)
    return uvloop.run(main)


class Application:
    """One server. `run` once; the ports are known from the ready line, `ready_file` or the fields here."""

    def __init__(self, settings: Settings, *, load_engine: LoadEngine | None = None) -> None:
        self._settings = settings
        self.health = Health()
        self.metrics = Metrics()
        self._registry = Registry(settings, self.metrics, load_engine)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self.ready = asyncio.Event()
        self.rest_port = settings.rest_port
        self.grpc_port = settings.grpc_port
        self._store: UserStore | None = None
        self._http: HttpServer | None = None
        self._http_task: asyncio.Task[None] | None = None
        self._grpc: GrpcServer | None = None
        self._tracing: Tracing | None = None

    def stop(self) -> None:
        """Begin to drain; called again, give up on what has not finished."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def run(self) -> Exit:
        """Start, load, serve until told to stop, drain."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            return await self._run()
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    async def _run(self) -> Exit:
        try:
            code = await self._serve()
        except (RetrievalError, SettingsError, OSError) as error:
            _log_failure(error)
            code = 1
        except Exception:
            log.exception("the server failed")
            code = 1
        drained = await self._drain_in_time()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        log.info("stopped", code=code if drained else 1)
        return Exit(code, self._registry.loading) if drained else Exit(1, threads_left=True)

    async def _serve(self) -> int:
        settings = self._settings
        self._store = await open_user_store(
            settings.user_store_location,
            history_limit=settings.user_history_limit,
            timeout_s=settings.user_store_timeout_ms / 1e3,
        )
        service = RetrievalService(
            self._registry, self._store, settings, health=self.health, metrics=self.metrics
        )
        await self._open(service)
        if not await self._unless_stopped(self._registry.load()):
            return 0
        self._announce()
        await self._unless_stopped(self._look_after(service))
        return 0

    async def _look_after(self, service: RetrievalService) -> None:
        """All that goes on by itself while the server serves."""
        settings = self._settings
        work = [keep_recovering(self.health, service.probe, give_up_after_s=settings.exit_after_impaired_s)]
        if settings.poll_interval_s:
            work.append(self._registry.keep_watching())
        if settings.model_config_file is not None and settings.model_config_poll_interval_s:
            work.append(self._registry.keep_reading_config())
        await asyncio.gather(*work)

    async def _open(self, service: RetrievalService) -> None:
        settings = self._settings
        self._tracing = open_tracing(settings)
        access, tls = open_access(settings, self.metrics), open_tls(settings, self.metrics)
        warn_of_exposure(settings, access)
        listener = _listen(settings.host, settings.rest_port)
        self.rest_port = listener.getsockname()[1]
        self._http = create_http_server(
            service, settings, self.health, self.metrics, access, tls, self._tracing
        )
        self._http_task = asyncio.create_task(self._http.serve(sockets=[listener]))
        self._grpc, self.grpc_port = create_server(
            service, settings, self.health, self.metrics, access, tls, self._tracing
        )
        await self._grpc.start()
        log.info("listening", rest=self._address(self.rest_port), grpc=self._address(self.grpc_port))

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run `work` to its end (True) or until `stop` (False); raises what it or the REST server raises."""
        assert self._http_task is not None
        task = asyncio.create_task(work)
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stopped, self._http_task}, return_when=asyncio.FIRST_COMPLETED)
            if self._http_task.done():
                self._http_task.result()
                raise RuntimeError("the REST server ended by itself")
            if task.done():
                task.result()
            return task.done()
        finally:
            for unfinished in (task, stopped):
                unfinished.cancel()

    def _announce(self) -> None:
        # What was loaded lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        self.health.loaded()
        if self._settings.ready_file is not None:
            ports = {"pid": os.getpid(), "rest_port": self.rest_port, "grpc_port": self.grpc_port}
            partial = self._settings.ready_file.with_suffix(".partial")
            partial.write_text(json.dumps(ports) + "\n", encoding="utf-8")
            partial.replace(self._settings.ready_file)
        scheme = "http" if self._settings.tls_cert_file is None else "https"
        log.info(
            f"ready: REST {scheme}://{self._address(self.rest_port)}, gRPC {self._address(self.grpc_port)}",
            models={served.name: served.version for served in self._registry.all_served()},
        )
        self.ready.set()

    def _address(self, port: int) -> str:
        host = self._settings.host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _drain_in_time(self) -> bool:
        """Drain; False when `drain_grace_s` or a second signal came first."""
        draining = asyncio.create_task(self._drain())
        hurried = asyncio.create_task(self._hurry.wait())
        done, unfinished = await asyncio.wait(
            {draining, hurried}, timeout=self._settings.drain_grace_s, return_when=asyncio.FIRST_COMPLETED
        )
        for task in unfinished:
            task.cancel()
        if draining not in done:
            log.error("gave up on requests that did not finish", drain_grace_s=self._settings.drain_grace_s)
            return False
        draining.result()
        return True

    async def _drain(self) -> None:
        self.health.draining()  # from here on both transports refuse what is new
        self._registry.refuse_changes()
        log.info("draining")
        if self.ready.is_set():
            # What is on its way was sent to a server that was ready; a closed port would be no answer to it.
            await asyncio.sleep(min(self._settings.drain_linger_s, self._settings.drain_grace_s / 2))
        closing: list[Coroutine[Any, Any, None]] = []
        if self._grpc is not None:
            closing.append(self._grpc.stop(self._settings.drain_grace_s))
        if self._http is not None and self._http_task is not None:
            self._http.should_exit = True
            closing.append(_ended(self._http_task))
        await asyncio.gather(*closing)
        await self._registry.close()
        if self._store is not None:
            await self._store.close()


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task})


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
        # Accepted connections inherit it. uvloop would set it itself; asyncio does not for a socket that it
        # was given, and then each reply's body waits 40 ms for the acknowledgement of its head.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --rest-port"
        ) from error


def _log_failure(error: Exception) -> None:
    if isinstance(error, ArtifactError):
        log.error(f"cannot serve: {error}", file=error.file, expected=error.expected, found=error.found)
    else:
        log.error(f"cannot serve: {error}")
