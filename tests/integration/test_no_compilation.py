"""After ready nothing is compiled: XLA's own dump of modules, and numba's own list of signatures, say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_world import add_gate
from tiny_models import make_model_world

ROOT = Path(__file__).parents[2]
PROBE = ROOT / "tests" / "support" / "compilation_probe.py"
N_QUERIES = 1000


def start(version: Path, cache: Path, dump: Path, n_queries: int) -> dict[str, Any]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "TF_XLA_FLAGS")
    }
    environment["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(PROBE), *map(str, (version, cache, dump, n_queries))],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("compilation")
    make_model_world(place / "1", num_items=5000, degree=8, start_points=100, entries=64)
    add_gate(place / "1")
    return place


@pytest.fixture(scope="module")
def cold(place) -> dict[str, Any]:
    """The first start, with an empty cache of programs."""
    report = start(place / "1", place / "cache", place / "dump", N_QUERIES)
    report["cached"] = sorted(path.name for path in (place / "cache").rglob("*") if path.is_file())
    return report


def test_a_thousand_random_queries_compile_no_module(cold) -> None:
    asked = cold["asked"]
    assert asked["n_queries"] >= N_QUERIES
    assert asked["n_gated"] >= 20
    assert set(asked["policies"]) == {"best_first", "level", "exhaustive"}
    assert set(asked["batch_sizes"]) == {"1", "2", "3", "4"}
    assert cold["modules_after_warm_up"] >= cold["n_programs"] > 40
    assert cold["modules_after_queries"] == cold["modules_after_warm_up"]
    assert cold["n_compilations"] == cold["n_programs"]


def test_a_thousand_random_queries_compile_no_kernel(cold) -> None:
    before, after = cold["signatures_after_warm_up"], cold["signatures_after_queries"]
    # The loops that Python enters; those they call come with them.
    entered = {"seed", "expand", "merge", "advance", "admit", "gather_rows", "unpack", "expand_gated"}
    assert all(before[name] for name in entered)
    assert after == before


def test_the_engine_imports_tensorflow_for_a_model_and_faiss_never(cold) -> None:
    assert cold["imported_by_engine"] == []
    assert "tensorflow" in cold["imported_by_tensorflow"]
    assert cold["imported_by_model"] == cold["imported_by_tensorflow"]
    assert not {"faiss", "nann.offline"} & set(cold["imported_by_model"])


def test_a_second_start_compiles_nothing_anew(place, cold, capsys) -> None:
    assert len(cold["cached"]) >= cold["n_programs"]
    warm = start(place / "1", place / "cache", place / "dump-warm", 50)
    cached = sorted(path.name for path in (place / "cache").rglob("*") if path.is_file())
    assert cached == cold["cached"]
    assert warm["n_programs"] == cold["n_programs"]
    assert warm["modules_after_queries"] == warm["modules_after_warm_up"]
    with capsys.disabled():
        print(
            f"\nwarm-up of {warm['n_programs']} programs: {cold['warm_up_s']:.1f} s with an empty cache, "
            f"{warm['warm_up_s']:.1f} s with a full one"
        )
