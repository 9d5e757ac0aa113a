"""The folder list is the architecture: who may import whom, what stays unloaded, how long a file is."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nann"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "pb" not in path.relative_to(PACKAGE).parts)
MAX_LINES = 500

# Which package may import which other part of this project (design, "Imports").
ALLOWED = {
    "engine": {"engine"},
    "service": {"service", "engine"},
    "offline": {"offline", "engine"},
    "cli": {"cli", "service", "offline", "engine"},
}
# Where a heavy or special library may be named at all, even inside a function.
HOMES = {
    "cupy": ("engine/cuda/",),
    "tensorflow": ("engine/scoring/tensorflow_", "engine/cuda/", "offline/"),
    "keras": ("offline/",),
    "jax": ("engine/scoring/pjrt_", "engine/cuda/", "offline/benchmark/gpu/"),
    "jaxlib": ("engine/scoring/pjrt_client.py",),
    "faiss": (
        "offline/builders/",
        "engine/retrievers/faiss",
        "offline/benchmark/compare/indexes.py",
        "offline/benchmark/replay/graphs.py",
    ),
    "hnswlib": (
        "offline/builders/",
        "engine/retrievers/hnswlib",
        "offline/benchmark/compare/indexes.py",
    ),
    "scann": ("offline/benchmark/compare/scann_process.py",),
    "fastapi": ("service/http_api/", "service/app.py"),
    "starlette": ("service/http_api/", "service/app.py"),
    "uvicorn": ("service/http_api/",),
    "grpc": ("service/grpc_api/", "service/app.py", "cli/"),  # the command line is a client
    "typer": ("cli/",),
    "redis": ("service/user_store/redis.py",),
    "opentelemetry": ("service/tracing.py",),
}


def _imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere but under ``if TYPE_CHECKING``."""
    names = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        pending += ast.iter_child_nodes(node)
    return names


IMPORTS = {path.relative_to(PACKAGE).as_posix(): _imports(path) for path in FILES}


def test_files_were_found() -> None:
    assert len(IMPORTS) > 50
    assert "nann.engine.types.Hits" in IMPORTS["engine/search_engine.py"]


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_import_only_what_lies_below(part: str) -> None:
    wrong = {
        (file, name)
        for file, names in IMPORTS.items()
        for name in names
        if file.startswith(f"{part}/")
        and name.startswith("nann.")
        and name.split(".")[1] not in ALLOWED[part]
    }
    assert not wrong


@pytest.mark.parametrize("library", HOMES)
def test_a_special_library_is_named_only_at_home(library: str) -> None:
    wrong = {
        file
        for file, names in IMPORTS.items()
        if any(name.split(".")[0] == library for name in names) and not file.startswith(HOMES[library])
    }
    assert not wrong


def test_the_engine_waits_for_nothing() -> None:
    forbidden = {"asyncio", "anyio", "socket", "httpx", "requests", "prometheus_client"}
    wrong = {
        (file, name)
        for file, names in IMPORTS.items()
        for name in names
        if file.startswith("engine/") and name.split(".")[0] in forbidden
    }
    assert not wrong


def test_production_does_not_import_the_annotations_of_arrays() -> None:
    wrong = {
        file
        for file, names in IMPORTS.items()
        if any(n.split(".")[0] in ("jaxtyping", "beartype") for n in names)
    }
    assert not wrong


@pytest.mark.parametrize(
    "module",
    [
        "nann.service.app",
        "nann.engine.search_engine",
        "nann.cli.main",
        "nann.offline.benchmark.run",
        "nann.offline.benchmark.compare.run",
        "nann.offline.pipeline",
    ],
)
def test_importing_it_loads_no_heavy_library(module: str) -> None:
    program = (
        f"import {module}, sys\n"
        "heavy = {'tensorflow', 'keras', 'faiss', 'hnswlib', 'cupy', 'matplotlib', 'jaxtyping', 'implicit',\n"
        "    'jax', 'jaxlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_what_is_imported_is_declared() -> None:
    """Everything installed by accident works here and fails on the next machine."""
    requirements = [line for line in metadata.requires("nann") or [] if 'extra == "dev"' not in line]
    declared = {_distribution(requirement) for requirement in requirements}
    # Brought along by a declared one, by its own promise: tensorflow -> keras, fastapi -> starlette,
    # pydantic -> typing_extensions, numba -> llvmlite.
    declared |= {"keras", "starlette", "typing-extensions", "llvmlite"}
    providers = metadata.packages_distributions()
    undeclared = {
        (file, name)
        for file, names in IMPORTS.items()
        for name in {name.split(".")[0] for name in names}
        if name not in sys.stdlib_module_names
        and name not in ("nann", "cupy", "scann")  # ScaNN is in an environment of its own
        and not {_distribution(dist) for dist in providers.get(name, [name])} & declared
    }
    assert not undeclared


def _distribution(requirement: str) -> str:
    name = requirement
    for end in "<>=!~[; ":
        name = name.split(end)[0]
    return name.lower().replace("_", "-").replace(".", "-")
