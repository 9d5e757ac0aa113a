"""``make test-gpu``: everything that is tested on a GPU, and one summary of it.

The tests of this folder need NumPy, numba, JAX, CuPy and pytest; compute-sanitizer comes with CUDA's
toolkit. The contract suite needs more (`_CONTRACT_NEEDS`); where that is missing it is said to be not run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# pytest-asyncio and hypothesis are pure Python, with sortedcontainers and attrs; pydantic and polars are not.
_CONTRACT_NEEDS = ("hypothesis", "pytest_asyncio", "pydantic", "polars")
_NOTHING_COLLECTED = 5  # pytest's exit code
_SANITIZER_S = 900


def main() -> int:
    """0 when nothing that was run failed, and something was run."""
    device = _device()
    print(f"device: {device or 'none'}", flush=True)
    if device is None:
        print("nothing was run: these tests need a GPU")
        return 1
    rows = [
        _row("tests/gpu", [sys.executable, "-m", "pytest", "-c", "tests/gpu/pytest.ini", "tests/gpu", "-q"]),
        _contract(),
        *(_sanitizer(tool) for tool in ("memcheck", "racecheck")),
    ]
    print("\nsummary")
    for name, outcome, seconds in rows:
        print(f"  {name:<32} {outcome}{f' ({seconds:.0f} s)' if seconds else ''}")
    failed = any(outcome.startswith("FAILED") for _, outcome, _ in rows)
    return int(failed or not any(outcome == "passed" for _, outcome, _ in rows))


Row = tuple[str, str, float]


def _row(
    name: str, command: list[str], *, nothing: str = "FAILED: no test ran", limit_s: float = 1800
) -> Row:
    print(f"\n{name}: {' '.join(command)}", flush=True)
    started_s = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, check=False, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        return name, f"FAILED: no end after {limit_s:.0f} s", time.monotonic() - started_s
    outcome = {0: "passed", _NOTHING_COLLECTED: nothing}.get(code, f"FAILED: exit code {code}")
    return name, outcome, time.monotonic() - started_s


def _contract() -> Row:
    name = "contract suite on CUDA"
    missing = [package for package in _CONTRACT_NEEDS if find_spec(package) is None]
    if missing:
        return name, f"not run: install {', '.join(missing)}", 0.0
    command = [sys.executable, "-m", "pytest", "tests/contract", "-m", "gpu", "-q"]
    return _row(name, command, nothing="not run: no case of it is marked gpu")


def _sanitizer(tool: str) -> Row:
    name = f"compute-sanitizer {tool}"
    if os.environ.get("NANN_GPU_TESTS") == "shim":
        return _row(f"{name} (its driver alone)", [sys.executable, "tests/gpu/sanitize.py"])
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        return name, "not run: no compute-sanitizer, which comes with CUDA's toolkit", 0.0
    command = [
        program,
        "--tool",
        tool,
        "--target-processes",
        "all",
        "--error-exitcode",
        "9",
        sys.executable,
        "tests/gpu/sanitize.py",
    ]
    return _row(name, command, limit_s=_SANITIZER_S)


def _device() -> str | None:
    if os.environ.get("NANN_GPU_TESTS") == "shim":
        return "none, but a rehearsal on the stand-in for CuPy"
    sys.path.insert(0, str(ROOT))
    from nann.engine.cuda.inventory import cuda_devices
    from nann.engine.errors import Unsupported

    try:
        return "; ".join(map(str, cuda_devices()))
    except Unsupported as error:
        print(error)
        return None


if __name__ == "__main__":
    sys.exit(main())
