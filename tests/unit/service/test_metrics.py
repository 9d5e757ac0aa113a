from __future__ import annotations

import os
import time

from nann.engine.lanes import LaneProcess
from nann.service.metrics import LATENCY_BUCKETS_S, Metrics

CONTRACT = {
    "nann_requests_total",
    "nann_request_duration_seconds",
    "nann_queue_wait_seconds",
    "nann_queue_depth",
    "nann_batch_size",
    "nann_batches_total",
    "nann_search_duration_seconds",
    "nann_items_scored",
    "nann_search_steps",
    "nann_rejected_total",
    "nann_lanes_busy",
    "nann_model_ready",
    "nann_model_load_duration_seconds",
    "nann_index_items",
    "nann_xla_compilations_total",
}
# Beyond the contract: readiness says nothing while one device of several is lost.
MORE = {
    "nann_connections_refused_total",
    "nann_file_refused",
    "nann_lanes_doubted",
    "nann_model_load_failures_total",
    "nann_model_measured_recall",
    "nann_search_process_cpu_seconds_total",
    "nann_search_process_resident_memory_bytes",
    "nann_search_process_starts_total",
    "nann_shadow_recall",
    "nann_shadow_samples_total",
    "nann_user_store_duration_seconds",
    "nann_user_store_failures_total",
}


def served(metrics: Metrics, model: str = "nann", version: int = 3, n_items: int = 1000) -> None:
    metrics.version_ready(model, version, n_items=n_items, load_s=2.0, compilations=lambda: 12)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_exactly_the_names_of_the_contract_and_those_of_the_process() -> None:
    metrics = Metrics()
    text, content_type = metrics.render()
    names = {line.split()[2] for line in text.decode().splitlines() if line.startswith("# TYPE")}
    assert {name for name in names if name.startswith("nann_")} == CONTRACT | MORE
    assert {name.split("_")[0] for name in names} == {"nann", "process"}
    assert content_type.startswith("text/plain")


def test_buckets_resolve_half_a_millisecond_to_two_and_a_half_seconds() -> None:
    assert (LATENCY_BUCKETS_S[0], LATENCY_BUCKETS_S[-1]) == (0.0005, 2.5)
    assert sorted(LATENCY_BUCKETS_S) == list(LATENCY_BUCKETS_S)


def test_requests_are_labelled_by_served_models_only() -> None:
    metrics = Metrics()
    served(metrics)
    for model in ("nann", None, "no such", "x" * 10_000):
        metrics.observe_request(api="http", method="retrieve", model=model, code="ok", duration_s=0.004)
    labels = {"api": "http", "method": "retrieve", "code": "ok"}
    assert value(metrics, "nann_requests_total", model="nann", **labels) == 2
    assert value(metrics, "nann_requests_total", model="unknown", **labels) == 2
    duration = {"api": "http", "method": "retrieve", "model": "nann"}
    assert value(metrics, "nann_request_duration_seconds_bucket", le="0.003", **duration) == 0
    assert value(metrics, "nann_request_duration_seconds_bucket", le="0.005", **duration) == 2


def test_an_unnamed_model_of_several_is_unknown() -> None:
    metrics = Metrics()
    served(metrics)
    served(metrics, "other")
    assert metrics.model_label(None) == "unknown"
    assert metrics.model_label("other") == "other"


def test_a_batcher_reports_what_happens_to_it() -> None:
    metrics = Metrics()
    one, two = metrics.batch_observer("nann"), metrics.batch_observer("other")
    one.queue_changed(+3)
    two.queue_changed(+1)
    one.queue_changed(-2)
    one.lanes_changed(+1)
    one.waited(0.001)
    one.dispatched(2, "full")
    one.searched(0.25)
    one.rejected("queue_full")
    assert value(metrics, "nann_queue_depth") == 2
    assert value(metrics, "nann_lanes_busy") == 1
    assert value(metrics, "nann_queue_wait_seconds_count") == 1
    assert value(metrics, "nann_batch_size_sum") == 2
    assert value(metrics, "nann_batches_total", reason="full") == 1
    assert value(metrics, "nann_search_duration_seconds_sum", model="nann") == 0.25
    assert value(metrics, "nann_rejected_total", reason="queue_full") == 1


def test_versions_come_and_go_and_no_counter_falls() -> None:
    metrics = Metrics()
    served(metrics)
    served(metrics, "other", 1, n_items=50)
    metrics.observe_search(n_scored=6120, steps=9)
    assert value(metrics, "nann_model_ready", model="nann", version="3") == 1
    assert value(metrics, "nann_index_items") == 1050
    assert value(metrics, "nann_model_load_duration_seconds_count") == 2
    assert value(metrics, "nann_xla_compilations_total") == 24
    assert value(metrics, "nann_items_scored_sum") == 6120
    assert value(metrics, "nann_search_steps_sum") == 9
    metrics.version_loading("nann", 4)
    metrics.load_failed("nann", 4)
    assert value(metrics, "nann_model_ready", model="nann", version="4") == 0
    assert value(metrics, "nann_model_load_failures_total", model="nann") == 1
    metrics.version_gone("nann", 4)
    metrics.version_gone("nann", 3)
    assert value(metrics, "nann_model_ready", model="nann", version="3") is None
    assert value(metrics, "nann_index_items") == 50
    assert value(metrics, "nann_xla_compilations_total") == 24
    assert metrics.model_label("nann") == "unknown"


def test_a_process_that_searches_is_told_of_while_its_version_serves() -> None:
    metrics = Metrics()
    process = LaneProcess(os.getpid(), n_starts=2)
    labels = {"model": "nann", "version": "3"}
    metrics.version_ready("nann", 3, n_items=1, load_s=1.0, compilations=lambda: 0, process=lambda: process)
    served(metrics, "other")
    memory = value(metrics, "nann_search_process_resident_memory_bytes", **labels)
    assert memory is not None
    assert 10e6 < memory < 100e9
    before_s = value(metrics, "nann_search_process_cpu_seconds_total", **labels)
    assert before_s is not None
    assert 0 < before_s <= time.process_time() + 0.1
    assert value(metrics, "nann_search_process_starts_total", **labels) == 2
    assert value(metrics, "nann_search_process_starts_total", model="other", version="3") is None
    process = LaneProcess(2**22 + 1, n_starts=3)  # more than Linux gives: gone
    assert value(metrics, "nann_search_process_resident_memory_bytes", **labels) is None
    assert value(metrics, "nann_search_process_starts_total", **labels) == 3
    metrics.version_gone("nann", 3)
    assert value(metrics, "nann_search_process_starts_total", **labels) is None


def test_live_recall_is_told_by_model_and_profile() -> None:
    metrics = Metrics()
    metrics.observe_shadow_recall("nann", "fast", 0.97)
    metrics.shadow_sampled("nann", "measured")
    assert value(metrics, "nann_shadow_recall_sum", model="nann", profile="fast") == 0.97
    assert value(metrics, "nann_shadow_recall_bucket", model="nann", profile="fast", le="0.95") == 0
    assert value(metrics, "nann_shadow_samples_total", model="nann", outcome="measured") == 1


def test_the_recall_a_version_was_published_with_goes_away_with_it() -> None:
    metrics = Metrics()
    metrics.version_ready("nann", 3, n_items=1, load_s=1.0, compilations=lambda: 0, measured_recall=0.985)
    assert value(metrics, "nann_model_measured_recall", model="nann", version="3") == 0.985
    metrics.version_gone("nann", 3)
    assert value(metrics, "nann_model_measured_recall", model="nann", version="3") is None
