from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nann.service.settings import Settings, SettingsError
from nann.service.tracing import current_request, open_tracing

ROOT = Path(__file__).parents[3]


def test_off_is_the_default_and_makes_nothing(tmp_path: Path) -> None:
    assert open_tracing(Settings(repository=tmp_path)) is None
    assert current_request() is None


def test_off_loads_nothing_of_opentelemetry_but_what_fastapi_does() -> None:
    """Its API comes with FastAPI, which imports it; the SDK, the exporters and our own use of it do not."""
    program = (
        "import sys\n"
        "from nann.service.tracing import open_tracing\n"
        "from nann.service.settings import Settings\n"
        "assert open_tracing(Settings(repository='r')) is None\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'opentelemetry'))\n"
        "import nann.service.app\n"
        "ours = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "print(sorted(name for name in sys.modules if name.startswith(ours)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["[]", "[]"]


def test_without_the_extra_the_start_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"pip install 'nann\[otel\]'"):
        open_tracing(Settings(repository=tmp_path, tracing="otlp"))


@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
def test_a_protocol_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http/json")
    with pytest.raises(SettingsError, match="http/protobuf or grpc"):
        open_tracing(Settings(repository=tmp_path, tracing="otlp"))


@pytest.mark.parametrize(("protocol", "module"), [("grpc", "grpc"), ("http/protobuf", "http")])
def test_the_protocol_chooses_the_exporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, module: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    tracing = open_tracing(Settings(repository=tmp_path, tracing="otlp"))
    assert tracing is not None
    (processor,) = tracing._provider._active_span_processor._span_processors
    assert f".proto.{module}." in type(processor.span_exporter).__module__  # type: ignore[attr-defined]
    tracing.close()
