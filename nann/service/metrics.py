"""Prometheus metrics: every name, label and bucket of the service, in one registry an application.

No user or item id is ever a label, and a model name is one only if that model is served here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from nann.service.batcher import BatchObserver, DispatchReason, RejectReason
from nann.service.search_process.usage import process_usage

if TYPE_CHECKING:
    from nann.engine.lanes import LaneProcess

__all__ = [
    "LATENCY_BUCKETS_S",
    "OTHER_PROFILE",
    "UNKNOWN_MODEL",
    "Metrics",
    "ShadowOutcome",
    "StoreOperation",
    "WatchedFile",
]

# reference/operations-and-peers.md: the default buckets cannot resolve a service of 1 to 50 ms.
LATENCY_BUCKETS_S: Final = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02),
    *(0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5),
)
# From a file cache to a hashed, compiled index of tens of gigabytes.
_LOAD_BUCKETS_S: Final = (1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1200.0)
_BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_ITEMS_BUCKETS: Final = (100, 250, 500, 1e3, 2.5e3, 5e3, 1e4, 2.5e4, 5e4, 1e5, 1e6, 1e7)
_STEPS_BUCKETS: Final = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128)
_RECALL_BUCKETS: Final = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
UNKNOWN_MODEL: Final = "unknown"
OTHER_PROFILE: Final = "other"

StoreOperation: TypeAlias = Literal["read", "append", "delete"]
WatchedFile: TypeAlias = Literal["api_keys", "certificate", "model_config"]
ShadowOutcome: TypeAlias = Literal["measured", "in_flight", "busy", "too_large", "failed"]


class _Compilations(Collector):
    """Reads the engines' own count at scrape time."""

    def __init__(self, counts: dict[tuple[str, int], Callable[[], int]]) -> None:
        self._counts = counts
        self._unloaded = 0

    def retire(self, key: tuple[str, int]) -> None:
        """Keep what an unloaded version compiled in the total: a counter must never fall."""
        self._unloaded += self._counts.pop(key)()

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            "nann_xla_compilations", "Programs compiled by XLA since start; flat once ready."
        )
        family.add_metric([], self._unloaded + sum(count() for count in self._counts.values()))
        yield family


class _SearchProcesses(Collector):
    """Looks at the processes that search at scrape time."""

    def __init__(self, processes: dict[tuple[str, int], Callable[[], LaneProcess | None]]) -> None:
        self._processes = processes

    def collect(self) -> Iterable[Metric]:
        labels = ["model", "version"]
        resident = GaugeMetricFamily(
            "nann_search_process_resident_memory_bytes",
            "Resident memory of the process that searches a version.",
            labels=labels,
        )
        cpu = CounterMetricFamily(
            "nann_search_process_cpu_seconds", "Processor time of the process that searches.", labels=labels
        )
        starts = CounterMetricFamily(
            "nann_search_process_starts", "Times that such a process was started; 1 is usual.", labels=labels
        )
        for (model, version), process_of in self._processes.items():
            process = process_of()
            if process is None:
                continue
            values = [model, str(version)]
            starts.add_metric(values, process.n_starts)
            usage = process_usage(process.pid)
            if usage is not None:
                resident.add_metric(values, usage.resident_bytes)
                cpu.add_metric(values, usage.cpu_s)
        yield from (resident, cpu, starts)


class Metrics:
    """All metrics of one process (or of one test). Scraped through `render`."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series a counter and histogram, which nobody asked for
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=self.registry, buckets=tuple(buckets))

        self._requests = counter(
            "nann_requests_total",
            "Requests answered; code is ok or the error's word.",
            *("api", "method", "model", "code"),
        )
        self._request_duration = histogram(
            "nann_request_duration_seconds",
            "From the request read to its answer ready.",
            LATENCY_BUCKETS_S,
            *("api", "method", "model"),
        )
        self._request_series: dict[tuple[str, ...], tuple[Counter, Histogram]] = {}
        self._queue_wait = histogram(
            "nann_queue_wait_seconds", "Time a query waited for a lane.", LATENCY_BUCKETS_S
        )
        self._queue_depth = gauge("nann_queue_depth", "Queries waiting for a lane.")
        self._batch_size = histogram("nann_batch_size", "Queries in a batch.", _BATCH_BUCKETS)
        self._batches = counter("nann_batches_total", "Batches, by what sent them off.", "reason")
        self._search_duration = histogram(
            "nann_search_duration_seconds", "Time of a batch on its lane.", LATENCY_BUCKETS_S, "model"
        )
        self._items_scored = histogram(
            "nann_items_scored", "Items the model scored for one query.", _ITEMS_BUCKETS
        )
        self._search_steps = histogram(
            "nann_search_steps", "Calls of the model that one query took part in.", _STEPS_BUCKETS
        )
        self._rejected = counter("nann_rejected_total", "Queries refused or expired, by reason.", "reason")
        for reason in get_args(RejectReason):  # each shows 0, so that an alert sees the first rise
            self._rejected.labels(reason)
        self._lanes_busy = gauge("nann_lanes_busy", "Lanes that are searching.")
        self._lanes_doubted = gauge(
            "nann_lanes_doubted",
            "Lanes out of the rotation since a search failed on their device.",
            "model",
            "version",
        )
        self._store_duration = histogram(
            "nann_user_store_duration_seconds",
            "Time of a call that the user store carried out.",
            LATENCY_BUCKETS_S,
            "operation",
        )
        self._store_failures = counter(
            "nann_user_store_failures_total", "Calls that the user store did not carry out.", "operation"
        )
        self._file_refused = gauge(
            "nann_file_refused",
            "1 while a changed file cannot be used, and what it said before holds.",
            "file",
        )
        self._connections_refused = counter(
            "nann_connections_refused_total", "REST connections above the limit, probes excepted."
        )
        self._shadow_recall = histogram(
            "nann_shadow_recall",
            "Recall of sampled answers against an exhaustive search under the same model.",
            _RECALL_BUCKETS,
            *("model", "profile"),
        )
        self._shadow_samples = counter(
            "nann_shadow_samples_total",
            "Answers sampled for nann_shadow_recall, by what came of them.",
            *("model", "outcome"),
        )
        self._measured_recall = gauge(
            "nann_model_measured_recall",
            "Recall of the profile balanced when the version was evaluated.",
            *("model", "version"),
        )
        self._model_ready = gauge(
            "nann_model_ready", "1 when the version takes queries, 0 when it should.", "model", "version"
        )
        self._load_failures = counter(
            "nann_model_load_failures_total", "Versions that could not be loaded.", "model"
        )
        self._load_duration = histogram(
            "nann_model_load_duration_seconds", "Reading, verifying and warming a version.", _LOAD_BUCKETS_S
        )
        self._index_items = gauge("nann_index_items", "Items in the served indexes, all models together.")
        self._index_sizes: dict[tuple[str, int], int] = {}
        self._compilation_counts: dict[tuple[str, int], Callable[[], int]] = {}
        self._compilations = _Compilations(self._compilation_counts)
        self.registry.register(self._compilations)
        self._search_processes: dict[tuple[str, int], Callable[[], LaneProcess | None]] = {}
        self.registry.register(_SearchProcesses(self._search_processes))

    def observe_request(
        self, *, api: str, method: str, model: str | None, code: str, duration_s: float
    ) -> None:
        """Count one finished request.

        `model` is what the request named (None: nothing); `code` is ``"ok"`` or `ErrorRow.code`.
        """
        key = (api, method, self.model_label(model), code)
        series = self._request_series.get(key)
        if series is None:  # looking them up by their labels costs more than counting
            count, duration = self._requests.labels(*key), self._request_duration.labels(*key[:3])
            series = self._request_series[key] = (count, duration)
        series[0].inc()
        series[1].observe(duration_s)

    def model_label(self, model: str | None) -> str:
        """`model` if it is served; the only served one for None; else ``unknown``."""
        served = {name for name, _ in self._index_sizes}
        if model is None and len(served) == 1:
            return next(iter(served))
        return model if model is not None and model in served else UNKNOWN_MODEL

    def observe_search(self, *, n_scored: int, steps: int) -> None:
        """Record what one answered query cost."""
        self._items_scored.observe(n_scored)
        self._search_steps.observe(steps)

    def version_loading(self, model: str, version: int) -> None:
        """A version is being loaded; it stays at 0 when that fails."""
        self._model_ready.labels(model, str(version)).set(0)
        self._load_failures.labels(model)  # shows 0 from the start, so that an alert sees the first rise

    def load_failed(self, model: str, version: int) -> None:
        """A version could not be loaded."""
        self._load_failures.labels(model).inc()

    def shadow_sampled(self, model: str, outcome: ShadowOutcome) -> None:
        """An answer was sampled, and this came of it."""
        self._shadow_samples.labels(model, outcome).inc()

    def observe_shadow_recall(self, model: str, profile: str, recall: float) -> None:
        """The recall of one sampled answer."""
        self._shadow_recall.labels(model, profile).observe(recall)

    def store_answered(self, operation: StoreOperation, duration_s: float) -> None:
        """The user store carried out a call."""
        self._store_duration.labels(operation).observe(duration_s)

    def store_failed(self, operation: StoreOperation) -> None:
        """The user store did not carry out a call."""
        self._store_failures.labels(operation).inc()

    def file_checked(self, file: WatchedFile, *, refused: bool) -> None:
        """A file was read, at start or because it changed; `refused` when it cannot be used."""
        self._file_refused.labels(file).set(refused)

    def connection_refused(self) -> None:
        """A REST connection above the limit was closed, with or without an answer."""
        self._connections_refused.inc()

    def version_ready(
        self,
        model: str,
        version: int,
        *,
        n_items: int,
        load_s: float,
        compilations: Callable[[], int],
        process: Callable[[], LaneProcess | None] = lambda: None,
        measured_recall: float | None = None,
    ) -> None:
        """A version was loaded, warmed and takes queries from now on; `measured_recall` as published."""
        if measured_recall is not None:
            self._measured_recall.labels(model, str(version)).set(measured_recall)
        self._load_duration.observe(load_s)
        self._model_ready.labels(model, str(version)).set(1)
        self._lanes_doubted.labels(model, str(version)).set(0)
        self._index_sizes[model, version] = n_items
        self._index_items.set(sum(self._index_sizes.values()))
        self._compilation_counts[model, version] = compilations
        self._search_processes[model, version] = process

    def lanes_changed(self, model: str, version: int, *, doubted: int) -> None:
        """So many lanes of a version wait for a search that proves them."""
        self._lanes_doubted.labels(model, str(version)).set(doubted)

    def version_gone(self, model: str, version: int) -> None:
        """A version takes no queries any more, and is not wanted to: its series end."""
        for gauge in (self._model_ready, self._lanes_doubted, self._measured_recall):
            with suppress(KeyError):  # prometheus_client's word for: there is none
                gauge.remove(model, str(version))
        if self._index_sizes.pop((model, version), None) is not None:
            self._index_items.set(sum(self._index_sizes.values()))
            self._compilations.retire((model, version))
            del self._search_processes[model, version]

    def batch_observer(self, model: str) -> BatchObserver:
        """What a batcher of `model` reports to."""
        return _BatchMetrics(self, model)

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _BatchMetrics(BatchObserver):
    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._search_duration = metrics._search_duration.labels(model)

    def queue_changed(self, delta: int) -> None:
        self._metrics._queue_depth.inc(delta)

    def lanes_changed(self, delta: int) -> None:
        self._metrics._lanes_busy.inc(delta)

    def waited(self, queue_wait_s: float) -> None:
        self._metrics._queue_wait.observe(queue_wait_s)

    def dispatched(self, size: int, reason: DispatchReason) -> None:
        self._metrics._batch_size.observe(size)
        self._metrics._batches.labels(reason).inc()

    def searched(self, search_s: float) -> None:
        self._search_duration.observe(search_s)

    def rejected(self, reason: RejectReason) -> None:
        self._metrics._rejected.labels(reason).inc()
