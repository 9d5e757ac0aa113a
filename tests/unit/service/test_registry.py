from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, settle

from nann.engine.errors import (
    ArtifactError,
    BackendError,
    InvalidQuery,
    NotReady,
    UnknownLabel,
    UnknownModel,
    UnknownVersion,
)
from nann.engine.types import SearchParams
from nann.service.metrics import Metrics
from nann.service.registry import Registry, find_newest_versions
from nann.service.settings import Settings, SettingsError
from nann.service.types import VersionStatus


def make_repository(root: Path, **versions: list[str]) -> Path:
    for model, names in versions.items():
        for name in names:
            (root / model / name).mkdir(parents=True)
    return root


class Loader:
    """Loads fakes; keeps what it loaded, and where from."""

    def __init__(self, **engine: Any) -> None:
        self.engine = engine
        self.engines: dict[str, FakeEngine] = {}
        self.threads: set[str] = set()

    def __call__(self, path: Path) -> Any:
        self.threads.add(threading.current_thread().name)
        self.engines[f"{path.parent.name}/{path.name}"] = engine = FakeEngine(
            model=path.parent.name, version=int(path.name), **self.engine
        )
        return engine


def make(repository: Path, loader: Any, **settings: Any) -> Registry:
    return Registry(Settings(repository=repository, **settings), Metrics(), loader)


def test_versions_are_numbers_and_the_newest_is_not_the_last_by_name(tmp_path: Path) -> None:
    make_repository(tmp_path, nann=["9", "10", ".tmp-11", "12.partial", "007", "0"], other=["1"], empty=[])
    (tmp_path / "nann" / "99").write_text("a file")
    (tmp_path / "users.sqlite3").write_text("a file")
    assert find_newest_versions(tmp_path, None) == {
        "nann": (10, tmp_path / "nann" / "10"),
        "other": (1, tmp_path / "other" / "1"),
    }
    assert set(find_newest_versions(tmp_path, "other")) == {"other"}


def test_an_empty_repository_names_what_was_expected_and_found(tmp_path: Path) -> None:
    make_repository(tmp_path, nann=[".tmp-1"])
    for repository, model in [
        (tmp_path / "absent", None),
        (tmp_path, None),
        (tmp_path, "nann"),
        (tmp_path, "other"),
    ]:
        with pytest.raises(ArtifactError) as error:
            find_newest_versions(repository, model)
        assert error.value.file.startswith(str(tmp_path))


async def test_every_model_is_loaded_on_a_thread_and_served(tmp_path: Path) -> None:
    make_repository(tmp_path, nann=["1", "2"], other=["5"])
    loader = Loader()
    registry = make(tmp_path, loader)
    with pytest.raises(NotReady):
        registry.served("nann")
    await registry.load()
    assert set(loader.engines) == {"nann/2", "other/5"}
    assert threading.current_thread().name not in loader.threads
    assert registry.models() == ("nann", "other")
    assert registry.served("nann").version == 2
    assert registry.served("nann", version=2).engine is loader.engines["nann/2"]
    assert registry.status("nann") == [VersionStatus(2, "AVAILABLE")]
    assert registry._metrics.registry.get_sample_value("nann_index_items", {}) == 2000
    assert not registry.loading
    await registry.close()
    assert all(engine.closed for engine in loader.engines.values())
    assert registry.status("nann") == [VersionStatus(2, "END")]
    with pytest.raises(NotReady, match="version 2 is END"):
        registry.served("nann")


async def test_what_is_not_there(tmp_path: Path) -> None:
    make_repository(tmp_path, nann=["2"], other=["5"])
    registry = make(tmp_path, Loader())
    await registry.load()
    for ask in (registry.served, registry.status):
        with pytest.raises(UnknownModel, match="only nann, other"):
            ask("none")
        with pytest.raises(UnknownVersion, match="no version 1 here, only 2"):
            ask("nann", version=1)
        with pytest.raises(UnknownLabel, match="stable"):
            ask("nann", label="stable")
    with pytest.raises(InvalidQuery, match="name the model"):
        registry.served()
    await registry.close()


async def test_a_single_model_need_not_be_named(tmp_path: Path) -> None:
    registry = make(make_repository(tmp_path, nann=["2"], other=["1"]), Loader(), model="nann")
    with pytest.raises(NotReady):
        _ = registry.default_model
    await registry.load()
    assert (registry.default_model, registry.served().name) == ("nann", "nann")
    await registry.close()


async def test_nothing_is_reachable_before_it_is_loaded(tmp_path: Path) -> None:
    go = threading.Event()
    loader = Loader()

    def slow(path: Path) -> Any:
        assert go.wait(10)
        return loader(path)

    registry = make(make_repository(tmp_path, nann=["2"]), slow)
    loading = asyncio.create_task(registry.load())
    await settle()
    assert registry.status("nann") == [VersionStatus(2, "LOADING")]
    assert registry.loading
    with pytest.raises(NotReady, match="version 2 is LOADING"):
        registry.served("nann")
    go.set()
    await loading
    assert registry.served("nann").version == 2
    await registry.close()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ArtifactError("arrays/x.npy", expected="10 bytes", found="3"), "INTERNAL"),
        (BackendError("warm-up failed"), "UNAVAILABLE"),
    ],
)
async def test_a_version_that_does_not_load_ends_and_says_why(
    tmp_path: Path, error: Exception, code: str
) -> None:
    def broken(_path: Path) -> Any:
        raise error

    registry = make(make_repository(tmp_path, nann=["2"]), broken)
    with pytest.raises(type(error)):
        await registry.load()
    assert registry.status("nann") == [VersionStatus(2, "END", code, str(error))]
    await registry.close()


async def test_the_profile_of_a_query_that_names_none(tmp_path: Path) -> None:
    make_repository(tmp_path, nann=["1"])
    level = SearchParams(policy="level", level_topn=(1, 2, 3, 4, 5, 6))
    for settings, profiles, expected in [
        ({}, None, SearchParams(ef=300, beam_width=64)),
        ({"default_profile": "fast"}, None, SearchParams(ef=100, beam_width=32)),
        ({}, {}, SearchParams()),
        ({}, {"balanced": {"policy": "level", "level_topn": [1, 2, 3, 4, 5, 6]}}, level),
    ]:
        registry = make(tmp_path, Loader(profiles=profiles), **settings)
        await registry.load()
        assert registry.served().default_params == expected
        await registry.close()
    with pytest.raises(SettingsError, match="has only balanced, exact, fast"):
        await make(tmp_path, Loader(), default_profile="quick").load()
    with pytest.raises(ArtifactError, match="profiles"):
        await make(tmp_path, Loader(profiles={"x": {"width": 3}})).load()


async def test_a_version_is_freed_only_after_its_last_lease(tmp_path: Path) -> None:
    loader = Loader()
    registry = make(make_repository(tmp_path, nann=["1"]), loader)
    await registry.load()
    served = registry.served()
    with served.lease(), served.lease():
        closing = asyncio.create_task(registry.close())
        await settle()
        assert registry.status("nann") == [VersionStatus(1, "UNLOADING")]
        assert not loader.engines["nann/1"].closed
        with pytest.raises(NotReady):
            registry.served()
    await closing
    assert loader.engines["nann/1"].closed
