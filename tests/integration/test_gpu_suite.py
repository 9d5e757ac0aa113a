"""The GPU tests rehearsed on the stand-in for CuPy, so that they are known to work where a GPU is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_model_world

from nann.engine.artifacts import hash_files, read_manifest, write_manifest
from nann.offline.export_programs import GridOptions, export_programs
from nann.offline.progress import Progress

ROOT = Path(__file__).parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "NANN_GPU_TESTS": "shim", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def add_programs(version: Path) -> None:
    manifest = read_manifest(version)
    sets = {
        "cpu": GridOptions(max_batch=4, max_rows=64, tile_rows=32, wide=True, crossed=False),
        "gpu": GridOptions(max_batch=4, max_rows=256, tile_rows=32, wide=False, crossed=True),
    }
    programs = export_programs(version, manifest, sets, progress=Progress(silent=True))
    update = {"programs": programs, "files": hash_files(version)}
    write_manifest(version, manifest.model_copy(update=update))


@pytest.mark.slow
def test_the_suite_passes_on_the_stand_in(tmp_path: Path) -> None:
    version = tmp_path / "model" / "1"
    make_model_world(version, num_items=300)
    add_programs(version)
    words = ("-m", "pytest", "-c", "tests/gpu/pytest.ini", "tests/gpu", "-q", "-k", "not float16")
    done = run(*words, NANN_TEST_VERSION=str(version))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_the_sanitizer_s_driver_finds_every_search_equal() -> None:
    done = run("tests/gpu/sanitize.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 searches differ from the CPU's\n")


def test_without_a_gpu_nothing_passes_for_tested() -> None:
    done = run("tests/gpu/run.py", NANN_GPU_TESTS="", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "nothing was run" in done.stdout
