"""All sizes, one after the other: each is built, measured in fresh processes, written down and deleted."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nann.offline.benchmark.growth.building import MODEL_NAME, build_version
from nann.offline.benchmark.growth.opening import measure_opening
from nann.offline.benchmark.growth.searching import measure_loading, measure_searching
from nann.offline.benchmark.machine import Machine

__all__ = ["Options", "measure_sizes", "read_results"]


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: searches for `users` users over a corpus drawn from `seed`."""

    users: int
    seed: int
    ef_construction: int


def measure_sizes(sizes: Sequence[int], output: Path, options: Options, tell: Callable[[str], None]) -> None:
    """Write ``<size>.json`` into `output` for every size that has none yet, the smallest first.

    A version that was built and not yet measured is measured as it is.

    Raises:
        ValueError: what is there was measured with other options.
    """
    output.mkdir(parents=True, exist_ok=True)
    for size in sorted(set(sizes)):
        path = output / f"{size}.json"
        if path.is_file():
            if json.loads(path.read_text("utf-8"))["options"] != asdict(options):
                raise ValueError(f"{path} was measured with other options; delete it, or name another output")
            tell(f"{size:,} items: measured already")
            continue
        result = _measure(size, output / f"work-{size}", options, tell)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(output / f"work-{size}")


def read_results(output: Path) -> list[dict[str, Any]]:
    """What was measured so far, ascending by size."""
    return [
        json.loads(path.read_text("utf-8"))
        for path in sorted(output.glob("[0-9]*.json"), key=lambda path: int(path.stem))
    ]


def _measure(size: int, work: Path, options: Options, tell: Callable[[str], None]) -> dict[str, Any]:
    result: dict[str, Any] = {"items": size, "options": asdict(options), "machine": asdict(Machine.here())}
    built = work / "build.json"
    if not built.is_file():
        tell(f"{size:,} items: build")
        figures = _in_a_fresh_process(build_version, work, num_items=size, **asdict(options))
        built.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    result["build"] = json.loads(built.read_text("utf-8"))
    version = work / "repository" / MODEL_NAME / "1"
    for name, action in _actions(version, options):
        tell(f"{size:,} items: {name}")
        result[name] = action()
    return result


def _actions(version: Path, options: Options) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "opening", lambda: _in_a_fresh_process(measure_opening, version)
    yield "loading_cold", lambda: _in_a_fresh_process(measure_loading, version, cold=True)
    yield "loading", lambda: _in_a_fresh_process(measure_loading, version, cold=False)
    yield "searching", lambda: _in_a_fresh_process(measure_searching, version, users=options.users)


def _in_a_fresh_process(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """So that no measurement finds memory, imports or compiled programs of an earlier one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments, **named).result()
