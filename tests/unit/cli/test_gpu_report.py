"""The command of the GPU report: what it needs, and a whole rehearsal on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# What the machine of a GPU may lack; everything but numpy, numba, jax and cupy.
ABSENT = (
    "pydantic",
    "polars",
    "typer",
    "rich",
    "fastapi",
    "grpc",
    "tensorflow",
    "faiss",
    "orjson",
    "uvloop",
    "typing_extensions",
    "structlog",
    "prometheus_client",
    "jaxtyping",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = (
        f"import sys\nfor name in {ABSENT}:\n    sys.modules[name] = None\n"
        "from nann.cli.gpu_report import main\nsys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_a_rehearsal_needs_no_other_package_and_writes_the_report(tmp_path: Path) -> None:
    sizes = {"items": 1000, "users": 6, "batch": 4, "lanes": 1, "load-seconds": 0.1, "seconds": 900}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    docs = tmp_path / "docs.md"
    done = run("--device", "cpu", "--output", str(tmp_path / "out"), "--docs", str(docs), *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    failed = {name: step["why"] for name, step in report["steps"].items() if step["status"] == "failed"}
    assert not failed
    assert report["steps"]["exhaustive"]["figures"]["rows"][0]["mean_items_scored"] == 1000
    text = docs.read_text(encoding="utf-8")
    assert text == (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
    assert "**No GPU figure exists yet.**" in text
    for secret in (str(tmp_path), str(Path.home())):
        assert secret not in text


def test_a_device_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = run("--device", "cuda:7", "--output", str(tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "cuda:7" in done.stderr
