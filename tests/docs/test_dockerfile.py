"""The Dockerfile as a text: no image is built here, so what can be read off it is held by these tests."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from documents import DOCS, ROOT

from nann.service.settings import ENV_PREFIX, Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WRITABLE = {"/var/cache/nann", "/var/lib/nann"}


@dataclass
class Stage:
    """One ``FROM`` and the instructions after it: (word, rest of the line)."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [rest for found, rest in self.instructions if found == word]


def read_dockerfile(text: str) -> tuple[dict[str, str], dict[str, Stage]]:
    """Arguments before the first stage, and the stages by name, in order."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.M)
    text = re.sub(r"\\\n", " ", text)
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            named = re.fullmatch(r"(\S+) AS (\S+)", rest)
            assert named is not None, f"a stage without a name: {line}"
            current = stages[named[2]] = Stage(re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], named[1]))
        elif current is None:
            assert word == "ARG", line
            name, value = rest.split("=", 1)
            arguments[name] = value
        else:
            current.instructions.append((word, rest.strip()))
    return arguments, stages


ARGUMENTS, STAGES = read_dockerfile((ROOT / "Dockerfile").read_text(encoding="utf-8"))
TARGETS = ("cpu", "gpu")


def ancestry(name: str) -> Iterator[Stage]:
    """The stage and those it starts from, nearest first."""
    stage = STAGES[name]
    yield stage
    if stage.base in STAGES:
        yield from ancestry(stage.base)


def last(name: str, word: str) -> str:
    return next(stage.all(word)[-1] for stage in ancestry(name) if stage.all(word))


def environment(name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for stage in reversed(list(ancestry(name))):
        for line in stage.all("ENV"):
            found |= dict(pair.split("=", 1) for pair in shlex.split(line))
    return found


def test_both_targets_exist_and_the_cpu_is_the_default() -> None:
    assert set(TARGETS) <= set(STAGES)
    assert list(STAGES)[-1] == "cpu"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target, image in [("image", "cpu"), ("image-gpu", "gpu")]:
        assert re.search(rf"^{target}:.*\n\tdocker build --target {image} ", makefile, re.M)


def test_every_base_is_a_stage_or_an_image_of_one_version() -> None:
    for stage in STAGES.values():
        if stage.base in STAGES:
            continue
        image, _, tag = stage.base.partition(":")
        assert image == "python"
        assert re.fullmatch(r"\d+\.\d+\.\d+-slim-\w+", tag), f"{stage.base} names no single version"
    version = re.search(r":(\d+)\.(\d+)", ARGUMENTS["PYTHON_IMAGE"])
    assert version is not None
    assert (3, 10) <= (int(version[1]), int(version[2])) <= (3, 12)  # what constraints.txt is tested with


@pytest.mark.parametrize("target", TARGETS)
def test_it_does_not_run_as_root(target: str) -> None:
    uid, gid = last(target, "USER").split(":")
    assert int(uid) > 0
    assert int(gid) > 0  # numbers, so that Kubernetes can tell (runAsNonRoot)
    (created,) = [line for line in STAGES["runtime"].all("RUN") if "useradd" in line]
    assert f"--uid {uid} " in created
    assert f"groupadd --gid {gid} " in created


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_installed_is_pinned_and_nothing_that_installs_is_left(target: str) -> None:
    (copied,) = STAGES[target].all("COPY")
    source = re.fullmatch(r"--from=(\S+) /opt/nann /opt/nann", copied)
    assert source is not None
    installs = [line for stage in ancestry(source[1]) for line in stage.all("RUN") if " install " in line]
    assert installs
    for line in installs:
        assert "--constraint constraints.txt" in line
    assert any("venv --without-pip" in line for stage in ancestry(source[1]) for line in stage.all("RUN"))
    runtime = " ".join(line for stage in ancestry(target) for line in stage.all("RUN"))
    assert "pip uninstall --yes" in runtime
    assert "apt-get" not in runtime


def test_the_extras_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    for name in ("build-cpu", "build-gpu"):
        (argument,) = STAGES[name].all("ARG")
        assert set(argument.removeprefix("EXTRAS=").split(",")) <= extras


def test_every_kernel_is_installed() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    patterns = tools["setuptools"]["package-data"]["nann.engine.cuda"]
    package = ROOT / "nann" / "engine" / "cuda"
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    assert {path for path in package.rglob("*") if path.suffix in (".cu", ".cuh")} == installed != set()


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_is_written_goes_to_a_declared_place(target: str) -> None:
    volumes = set(json.loads(last(target, "VOLUME")))
    assert volumes == WRITABLE
    (created,) = [line for line in STAGES["runtime"].all("RUN") if "useradd" in line]
    for volume in volumes:
        assert f" {volume}" in created.partition("install --directory --owner nann")[2]
    env = environment(target)
    for name in ("HOME", "NUMBA_CACHE_DIR", "CUDA_CACHE_PATH", "NANN_USER_STORE"):
        assert any(env[name] == volume or env[name].startswith(f"{volume}/") for volume in volumes), name
    # Settings' own caches lie in nann/ under it.
    assert f"{env['XDG_CACHE_HOME']}/nann" in volumes


@pytest.mark.parametrize("target", TARGETS)
def test_its_variables_are_settings(target: str) -> None:
    ours = {name: value for name, value in environment(target).items() if name.startswith(ENV_PREFIX)}
    fields = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in ours.items()}
    assert {"host", "repository", "device", "user_store"} <= set(fields) <= set(Settings.model_fields)
    settings = Settings.model_validate(fields)
    exposed = {int(port) for port in last(target, "EXPOSE").split()}
    assert exposed == {settings.rest_port, settings.grpc_port}
    assert settings.device == {"cpu": "cpu", "gpu": "cuda:0"}[target]
    assert json.loads(last(target, "ENTRYPOINT")) + json.loads(last(target, "CMD")) == ["nann", "serve"]


def test_the_gpu_image_asks_the_container_toolkit_for_a_gpu() -> None:
    env = environment("gpu")
    assert env["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert {"compute", "utility"} <= set(env["NVIDIA_DRIVER_CAPABILITIES"].split(","))


def _kept(path: str) -> bool:
    """Whether .dockerignore lets a path into the build; the last pattern that matches decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        plain = pattern.lstrip("!").removeprefix("**/")
        parts = [path, *map(str, Path(path).parents)] + ([Path(path).name] if "**/" in pattern else [])
        if any(fnmatch.fnmatch(part, plain) for part in parts if part != "."):
            kept = pattern.startswith("!")
    return kept


def test_what_is_copied_exists_and_gets_into_the_build() -> None:
    copied = [
        source
        for stage in STAGES.values()
        for line in stage.all("COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    ]
    assert {"pyproject.toml", "constraints.txt", "nann", "docker/healthcheck.py"} <= {
        source.removeprefix("./") for source in copied
    }
    for source in copied:
        assert (ROOT / source).exists(), source
        assert _kept(source), f".dockerignore keeps {source} out"
    for from_outside in [".git", ".venv/bin/python", "demo", "tests", "nann/cli/__pycache__/x.pyc"]:
        assert not _kept(from_outside), from_outside
    assert _kept("nann/engine/cuda/kernels/merge.cu")


def test_the_operations_page_names_both_images() -> None:
    text = (DOCS / "gpu-operations.md").read_text(encoding="utf-8")
    assert {"make image", "make image-gpu"} <= set(re.findall(r"`(make [a-z-]+)`", text))


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_the_health_check_asks_for_readiness(status: int | None, code: int) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/readyz"
            self.send_response(status or 0)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Ready)
    port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        if status is None:
            server.server_close()
        done = subprocess.run(
            [sys.executable, ROOT / "docker" / "healthcheck.py"],
            env={"NANN_REST_PORT": str(port)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.returncode == code, done.stderr
    assert json.loads(last("cpu", "HEALTHCHECK").partition("CMD ")[2]) == ["python", "/opt/healthcheck.py"]
