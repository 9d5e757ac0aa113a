"""The text says what was measured, what was not, and never more than that."""

from __future__ import annotations

from typing import Any

import pytest

from nann.offline.benchmark.gpu.report import report_text


def found(name: str, recall: float | None, scored: float = 17_500.0) -> dict[str, Any]:
    return {
        "name": name,
        "recall": recall,
        "recall_p5": recall,
        "mean_items_scored": scored,
        "steps": 12.0,
        "ms_a_batch": 4.0,
        "qps": 8000.0,
        "pairs_per_s": 140e6,
        "launches_a_search": 40.0,
        "programs_a_search": 13.0,
        "users": 512,
        "batch": 64,
    }


def load(setting: str, **changed: Any) -> dict[str, Any]:
    return {
        "setting": setting,
        "lanes": 2,
        "batch": 64,
        "loop": "open",
        "group": 64,
        "offered_qps": 7000.0,
        "qps": 6990.0,
        "p50_ms": 5.0,
        "p95_ms": 6.0,
        "p99_ms": 7.0,
        "late_ms": 0.1,
        "queries": 9000,
        "failures": 0,
        "mean_items_scored": 17_500.0,
        "pairs_per_s": 122e6,
        "recall": 0.9931,
        "launches_a_search": 41.0,
        "mean_batch": 63.5,
    } | changed


def step(figures: dict[str, Any], status: str = "done", why: str = "") -> dict[str, Any]:
    return {"status": status, "seconds": 3.0, "figures": figures, "why": why}


def report(device: str = "cuda:0", **steps: Any) -> dict[str, Any]:
    return {
        "command": "make gpu-report",
        "device": device,
        "items": 1_300_000,
        "precision": "float16",
        "machine": {"device": "cuda:0: A GPU", "driver": "580.1", "scorer": "PJRT"},
        "steps": {
            "ceilings": step(
                {
                    "copy_bytes_per_s": 3e12,
                    "matmul_flops": 700e12,
                    "copy_bytes": 2**32,
                    "matmul_size": 8192,
                    "matmul_dtype": "float16",
                }
            ),
            "corpus": step(
                {"items": 1_300_000, "users": 512, "mean_history": 44.0, "multiply_adds_a_pair": 23_072}
            ),
            "settings": step(
                {
                    "rows": [found("best_first ef 800, beam 64", 0.9905, 7000.0), found("heavy", 0.9954)],
                    "cheapest": "best_first ef 800, beam 64",
                    "cheapest_reaches": True,
                    "nann_load": "heavy",
                    "nann_load_reaches": True,
                }
            ),
            "gate": step({"rows": [load("heavy")]}),
            "rivals": step({"rows": [found("inner product 1,000 + rerank", 0.31, 1000.0)]}),
        }
        | steps,
    }


def test_a_gpu_s_report_judges_the_gate_and_shows_its_figures() -> None:
    text = report_text(report())
    assert "**Met: 6,990 QPS at 122 M pairs/s, p99 7.0 ms, recall@200 0.9931" in text
    assert "No GPU figure exists yet" not in text
    assert "copy 3,000 GB/s" in text and "700.00 TFLOP/s" in text
    assert "recall@200 of inner-product top 1,000 + rerank: 0.310 (not an easy corpus)" in text
    assert "best_first ef 800, beam 64 (the cheapest)" in text and "heavy (NANN's load)" in text
    assert "40 + 13" in text
    share = 2 * 23_072 * 140e6 / 700e12
    assert f"{share:.1%}" in text
    assert "## Not run\n\nNothing was left out." in text


def test_a_cpu_s_report_says_first_that_it_is_none() -> None:
    text = report_text(report(device="cpu"))
    assert text.index("**No GPU figure exists yet.**") < text.index("## Verdict")
    assert "Not judged: nothing here was measured on a GPU" in text
    assert "Met:" not in text and "Aim" not in text


def test_only_loads_at_nann_s_load_are_judged() -> None:
    other = step({"rows": [load("best_first ef 800, beam 64", qps=90_000.0)]})
    missed = step({"rows": [load("heavy", p99_ms=30.0)]})
    text = report_text(report(gate=missed, **{"lanes and batches": other}))
    assert "**Missed: p99 30.0 ms, not 10 ms" in text
    assert "Where its time goes was not measured." in text


def test_a_missed_gate_says_where_the_time_goes() -> None:
    row = {"batch": 64, "plain_ms": 5.0, "total_ms": 6.0, "phases_ms": {"gather": 1.5, "score": 4.5}}
    profiled = step({"rows": [row | {"setting": "other"}, row | {"setting": "heavy"}]})
    text = report_text(report(gate=step({"rows": [load("heavy", p99_ms=30.0)]}), profile=profiled))
    assert "what would remove it: score 4.50 ms (75%: the model's programs" in text
    assert "what would remove it" not in report_text(report(profile=profiled))


def test_an_easy_corpus_is_called_one() -> None:
    rivals = step({"rows": [found("inner product 1,000 + rerank", 0.95)]})
    assert "0.950 (TOO EASY a corpus" in report_text(report(rivals=rivals))


@pytest.mark.parametrize(
    ("status", "words"), [("cut", "cut short"), ("failed", "failed"), ("not run", "not run")]
)
def test_whatever_is_missing_is_listed_with_its_reason(status: str, words: str) -> None:
    text = report_text(report(profile=step({}, status, "no time")))
    assert f"- **profile**: {words}: no time" in text


def test_a_stand_in_for_a_setting_is_said_to_be_one() -> None:
    settings = report()["steps"]["settings"]["figures"]
    changed = settings | {"cheapest_reaches": False, "nann_load_reaches": False}
    text = report_text(report(settings=step(changed)))
    assert "No setting tried reached 0.99" in text and "No setting tried scored 17,000 items" in text


def test_it_can_be_written_when_nothing_was_measured() -> None:
    nothing = report()
    nothing["steps"] = {"ceilings": {"status": "failed", "seconds": 0.1, "figures": {}, "why": "no device"}}
    text = report_text(nothing)
    assert "Not judged: no load was measured" in text and "no device" in text
