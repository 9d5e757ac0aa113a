"""The whole report on the stand-in for CuPy, with XLA on the CPU: no line of it is new to a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cuda_shim.fixtures import FakeCupy, fake_cupy
from gpu_place import xla_on_the_cpu

from nann.cli import gpu_report
from nann.offline.benchmark.gpu import preparation, rig, session

__all__ = ["fake_cupy"]


@pytest.fixture
def report(fake_cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    import jax

    monkeypatch.setattr(preparation, "jax_device", lambda _device: jax.local_devices(backend="cpu")[0])
    # The stand-in's threads are fibers: everything as small as it can be and still take every path.
    monkeypatch.setattr(rig, "_GPU_MAX_ROWS", 1024)
    monkeypatch.setattr(rig, "_GPU_TILE_ROWS", 32)
    monkeypatch.setattr(session, "_BEST_FIRST", ((200, 64), (400, 64)))
    monkeypatch.setattr(session, "_LEVEL", ((20, 40, 40, 40, 40, 200),))
    monkeypatch.setattr(session, "_RIVAL_CANDIDATES", (1000,))
    monkeypatch.setattr(session, "_TILE_ROWS", (32, 64))
    monkeypatch.setattr(session, "_LANES", (2,))
    monkeypatch.setattr(session, "_PROFILED", 1)
    monkeypatch.setattr(session, "_GPU_FIRST_QPS", 20.0)
    monkeypatch.setattr(preparation, "_GPU_CEILINGS", (2**20, 64))
    sizes = {"items": 2000, "users": 4, "batch": 2, "lanes": 2, "load-seconds": 0.3, "seconds": 900}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    with xla_on_the_cpu():
        assert gpu_report.main(["--device", "cuda:0", "--output", str(tmp_path), *flags]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    found["text"] = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    return found


@pytest.mark.slow
def test_every_step_has_figures(report: dict[str, Any]) -> None:
    statuses = {name: (step["status"], step["why"]) for name, step in report["steps"].items()}
    measured = {name for name, (status, _) in statuses.items() if status in ("done", "cut")}
    assert measured == set(statuses), statuses
    steps = report["steps"]
    (exhaustive,) = steps["exhaustive"]["figures"]["rows"]
    assert exhaustive["mean_items_scored"] == 2000
    assert steps["oracle"]["figures"]["recall"] >= 0.99
    for row in steps["settings"]["figures"]["rows"]:
        assert row["launches_a_search"] > 3 and row["programs_a_search"] >= 2
    best_first = steps["settings"]["figures"]["rows"][1]
    assert best_first["recall"] >= 0.98 and best_first["mean_items_scored"] < 2000
    for name in ("gate", "cheapest", "lanes and batches"):
        rows = steps[name]["figures"]["rows"]
        assert rows and all(row["failures"] == 0 and row["recall"] > 0.9 for row in rows)
        assert all(row["launches_a_search"] > 3 for row in rows)
    assert steps["single queries"]["figures"]["rows"][0]["recall"] > 0.9
    assert "Not judged: 2,000 items are fewer than 1,300,000" in report["text"]
    assert "No GPU figure exists yet" not in report["text"]
