from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import FakeEngine
from golden import GOLDEN
from structlog.testing import capture_logs

from nann.engine import devices as engine_devices
from nann.engine.artifacts import Artifact
from nann.engine.devices import Device, DeviceMemory
from nann.engine.errors import ArtifactError, BackendError, Unsupported
from nann.engine.search_engine import SearchEngine
from nann.service import version_loader
from nann.service.search_process import lanes
from nann.service.search_process.lanes import Starter
from nann.service.search_process.messages import OpenLanes
from nann.service.settings import Settings
from nann.service.version_loader import VersionLoader, _writable, engine_loader


class NoLanes:
    """Stands in for `ProcessLanes`: keeps what it is asked for, and searches nothing."""

    count, depth, n_compilations, process, takes_comm_seq = 2, 2, 0, None, True

    def __init__(self, seen: list[Any]) -> None:
        self._seen = seen

    def __call__(self, ask: OpenLanes, _starter: Starter, **_options: Any) -> NoLanes:
        self._seen.append((ask.gives_way, ask.verify, _priority()))
        return self

    def warm_up(self) -> bool:
        raise BackendError("no lanes")

    def close(self) -> None:
        self._seen.append("closed")


def _priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
@pytest.mark.parametrize("beside_others", [True, False])
async def test_a_load_gives_way_to_searches(
    tmp_path: Path, beside_others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def load(_cls: Any, _version_dir: Path, **_options: Any) -> Any:
        seen.append(_priority())
        raise BackendError("seen")

    monkeypatch.setattr(SearchEngine, "load", classmethod(load))
    settings = Settings(repository=tmp_path, search_process=False, check_memory=False)
    before = _priority()
    with pytest.raises(BackendError, match="seen"):
        await VersionLoader(settings).load(tmp_path, beside_others=beside_others)
    assert seen == [10 if beside_others else before]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
@pytest.mark.parametrize("beside_others", [True, False])
async def test_a_search_process_gives_way_and_verifies_and_this_one_does_not_wait_with_its_interpreter(
    tmp_path: Path, beside_others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(lanes, "ProcessLanes", NoLanes(seen))
    settings = Settings(repository=tmp_path, device="cpu", scorer="tensorflow", xla_cache_dir=tmp_path)
    with pytest.raises(BackendError, match="no lanes"):
        await VersionLoader(settings).load(GOLDEN / "artifact", beside_others=beside_others)
    assert seen == [(beside_others, "full", _priority()), "closed"]


async def test_lanes_are_closed_if_the_version_cannot_be_opened_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_cls: Any, directory: Path, *, verify: str) -> Any:
        raise ArtifactError(str(directory), expected="a version", found=verify)

    seen: list[Any] = []
    monkeypatch.setattr(lanes, "ProcessLanes", NoLanes(seen))
    monkeypatch.setattr(Artifact, "open", classmethod(broken))
    settings = Settings(repository=tmp_path, device="cpu", scorer="tensorflow", xla_cache_dir=tmp_path)
    with pytest.raises(ArtifactError, match="fast"):
        await VersionLoader(settings).load(GOLDEN / "artifact", beside_others=False)
    assert seen[1:] == ["closed"]


async def test_a_version_without_a_manifest_is_left_to_the_load(tmp_path: Path) -> None:
    def load(path: Path) -> Any:
        raise ArtifactError(str(path), expected="a version", found="nothing")

    loader = VersionLoader(Settings(repository=tmp_path), load, available=lambda: 0)
    with pytest.raises(ArtifactError, match="a version"):
        await loader.load(tmp_path, beside_others=True)
    with pytest.raises(ArtifactError, match="manifest"):
        await loader.verify(tmp_path)
    assert not loader.busy


def test_what_served_one_version_of_a_model_serves_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = False
    devices: list[str] = []

    def load(_version_dir: Path, _settings: Settings, device: str, _starter: Starter | None) -> Any:
        devices.append(device)
        if full and device == "auto":
            raise BackendError("the device is full")
        return FakeEngine()

    monkeypatch.setattr(version_loader, "_load", load)
    monkeypatch.setattr(version_loader, "_chose_gpu", lambda _settings: True)
    loaded = engine_loader(Settings(repository=tmp_path))
    loaded(tmp_path / "nann" / "1")
    full = True
    with pytest.raises(BackendError):
        loaded(tmp_path / "nann" / "2")
    loaded(tmp_path / "other" / "1")
    assert devices == ["auto", "auto", "auto", "cpu"]


@pytest.mark.parametrize(
    ("device", "there", "tried"),
    [
        ("auto", Device("cuda", 0), ["auto", "cpu"]),
        ("auto", Device("cpu"), ["auto"]),
        ("cuda:0", Device("cuda", 0), ["cuda:0"]),
        ("cpu", Device("cuda", 0), ["cpu"]),
    ],
)
def test_only_a_gpu_that_auto_chose_is_left_for_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, there: Device, tried: list[str]
) -> None:
    devices: list[str] = []

    def load(_version_dir: Path, _settings: Settings, device: str, _starter: Starter | None) -> Any:
        devices.append(device)
        if len(devices) == 1:
            raise Unsupported("no programs for it")
        return FakeEngine()

    monkeypatch.setattr(version_loader, "_load", load)
    monkeypatch.setattr(engine_devices, "choose_devices", lambda _text, *, scorer: ((there,), scorer))
    loaded = engine_loader(Settings(repository=tmp_path, device=device))
    if len(tried) == 1:
        with pytest.raises(Unsupported, match="no programs"):
            loaded(tmp_path / "nann" / "1")
    else:
        loaded(tmp_path / "nann" / "1")
    assert devices == tried


def test_the_settings_of_devices_reach_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(_version_dir: Path, **options: Any) -> Any:
        seen.update(options)
        return SimpleNamespace(
            manifest=SimpleNamespace(model_name="nann"),
            placement="cuda:0",
            warm_up=lambda: SimpleNamespace(bit_equal=True),
        )

    monkeypatch.setattr(SearchEngine, "load", load)
    settings = Settings(
        repository=tmp_path,
        device="cuda:0,cuda:1",
        scorer="pjrt",
        kernel_cache_dir=tmp_path / "kernels",
        device_memory_limit="60%",
        xla_memory_fraction=0.25,
    )
    engine_loader(settings)(tmp_path)
    assert (seen["device"], seen["scorer"]) == ("cuda:0,cuda:1", "pjrt")
    assert seen["kernel_cache_dir"] == tmp_path / "kernels"
    assert seen["memory"] == DeviceMemory(limit=0.6, xla_fraction=0.25)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    good = tmp_path / "a" / "cache"
    assert _writable(good) == good
    assert list(good.iterdir()) == []
    (tmp_path / "file").touch()
    with capture_logs() as lines:
        assert _writable(tmp_path / "file" / "cache") is None
    assert [line["log_level"] for line in lines] == ["warning"]
