from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fake_engine import PATIENCE_S, FakeEngine, ManualTime, settle
from structlog.testing import capture_logs

from nann.engine.artifacts import FORMAT_VERSION, Manifest, write_manifest
from nann.engine.errors import (
    ArtifactError,
    BackendError,
    InvalidQuery,
    NotReady,
    Unavailable,
    UnknownLabel,
    UnknownModel,
    UnknownVersion,
)
from nann.engine.types import Query, SearchParams
from nann.service.errors import FailedPrecondition, PermissionDenied
from nann.service.metrics import Metrics
from nann.service.registry import Registry
from nann.service.settings import Settings, SettingsError
from nann.service.types import ModelConfig, VersionPolicy, VersionStatus
from nann.service.version_loader import VersionLoader


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
    time = ManualTime()
    registry = Registry(
        Settings(repository=repository, **settings), Metrics(), loader, clock=lambda: time.now_s
    )
    registry.time = time  # type: ignore[attr-defined]
    return registry


def sample(registry: Registry, name: str, **labels: str) -> float | None:
    return registry._versions._metrics.registry.get_sample_value(name, labels)


async def until(condition: Callable[[], bool]) -> None:
    """Let threads and tasks run until `condition` holds."""

    async def held() -> None:
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0)

    await asyncio.wait_for(held(), PATIENCE_S)


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
    assert sample(registry, "nann_index_items") == 2000
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
    await until(lambda: registry.loading)
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


# Swaps


async def test_a_new_version_is_served_before_the_old_one_goes(tmp_path: Path) -> None:
    loader = Loader()
    registry = make(make_repository(tmp_path, nann=["1"]), loader)
    await registry.load()
    old = registry.served()
    with old.lease():
        make_repository(tmp_path, nann=["2"])
        await registry.rescan()
        assert registry.served().version == 2
        await settle()
        assert registry.status("nann") == [VersionStatus(2, "AVAILABLE"), VersionStatus(1, "UNLOADING")]
        assert not loader.engines["nann/1"].closed
        with pytest.raises(UnknownVersion, match="version 1 is UNLOADING"):
            registry.served("nann", version=1)
    await until(lambda: loader.engines["nann/1"].closed)
    assert sample(registry, "nann_model_ready", model="nann", version="1") is None
    assert sample(registry, "nann_model_ready", model="nann", version="2") == 1
    await registry.close()


async def test_the_engine_is_freed_on_a_thread_by_its_last_reference(tmp_path: Path) -> None:
    freed: list[str] = []

    class Engine(FakeEngine):
        def __del__(self) -> None:
            freed.append(threading.current_thread().name)

    registry = make(
        make_repository(tmp_path, nann=["1"]), lambda path: Engine(version=int(path.name), lanes=1)
    )
    await registry.load()
    make_repository(tmp_path, nann=["2"])
    await registry.rescan()
    await until(lambda: bool(freed))
    assert freed == ["nann-load"]
    await registry.close()


@pytest.mark.parametrize(
    ("policy", "before", "after"),
    [
        ("latest:1", {2}, {3}),
        ("latest:2", {1, 2}, {2, 3}),
        ("all", {1, 2}, {1, 2, 3}),
        ("specific:1", {1}, {1}),
    ],
)
async def test_every_policy_holds_at_start_and_later(
    tmp_path: Path, policy: str, before: set[int], after: set[int]
) -> None:
    registry = make(make_repository(tmp_path, nann=["1", "2"]), Loader(), version_policy=policy)
    await registry.load()
    assert {served.version for served in registry.all_served()} == before
    make_repository(tmp_path, nann=["3"])
    await registry.rescan()
    await settle()
    assert {served.version for served in registry.all_served()} == after
    await registry.close()


async def test_taking_a_version_away_leads_back_to_the_one_before(tmp_path: Path) -> None:
    registry = make(make_repository(tmp_path, nann=["1", "2"]), Loader())
    await registry.load()
    (tmp_path / "nann" / "2").rmdir()
    await registry.rescan()
    await until(lambda: registry.status("nann")[0] == VersionStatus(2, "END"))
    assert registry.served().version == 1
    await registry.rescan()
    assert registry.status("nann") == [VersionStatus(1, "AVAILABLE")]
    await registry.close()


class Broken(Loader):
    """Fails for the versions in `broken`."""

    def __init__(self, *broken: str, error: Exception | None = None) -> None:
        super().__init__()
        self.broken = set(broken)
        self.error = error or BackendError("out of memory")
        self.tries: list[str] = []

    def __call__(self, path: Path) -> Any:
        name = f"{path.parent.name}/{path.name}"
        self.tries.append(name)
        if name in self.broken:
            raise self.error
        return super().__call__(path)


async def test_a_load_that_fails_leaves_the_old_version_and_shows(tmp_path: Path) -> None:
    manifest = tmp_path / "nann" / "2" / "manifest.json"
    loader = Broken("nann/2", error=ArtifactError(str(manifest), expected="a manifest", found="no file"))
    registry = make(make_repository(tmp_path, nann=["1"]), loader)
    await registry.load()
    make_repository(tmp_path, nann=["2"])
    await registry.rescan()
    assert registry.served().version == 1
    failed, serving = registry.status("nann")
    assert serving == VersionStatus(1, "AVAILABLE")
    assert (failed.state, failed.error_code) == ("END", "INTERNAL")
    assert failed.error_message == "nann/2/manifest.json: expected a manifest, found no file"
    assert sample(registry, "nann_model_load_failures_total", model="nann") == 1
    assert sample(registry, "nann_model_ready", model="nann", version="2") == 0
    with pytest.raises(UnknownVersion, match="version 2 is END"):
        registry.served("nann", version=2)
    loader.broken.clear()
    await registry.rescan()
    assert registry.served().version == 2
    await registry.close()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a bug"), AssertionError()])
async def test_even_a_bug_in_loading_leaves_the_old_version(tmp_path: Path, error: Exception) -> None:
    registry = make(make_repository(tmp_path, nann=["1"]), Broken("nann/2", error=error))
    await registry.load()
    make_repository(tmp_path, nann=["2"])
    await registry.rescan()
    assert registry.served().version == 1
    assert registry.status("nann")[0].error_message == "internal error; the server's log has it"
    await registry.close()


async def test_a_profile_that_a_new_version_lacks_frees_its_engine(tmp_path: Path) -> None:
    loader = Loader()
    registry = make(make_repository(tmp_path, nann=["1"]), loader, default_profile="fast")
    await registry.load()
    loader.engine = {"profiles": {}}
    make_repository(tmp_path, nann=["2"])
    await registry.rescan()
    assert registry.served().version == 1
    assert loader.engines["nann/2"].closed
    await registry.close()


class Ticks:
    """Stands in for `asyncio.sleep`: each pause lasts until the test lets one look happen."""

    def __init__(self) -> None:
        self._ticks: asyncio.Queue[None] = asyncio.Queue()
        self.pauses: list[float] = []
        self._waiting = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self._waiting.set()
        await self._ticks.get()

    async def look(self) -> None:
        """Let one look happen, and return when the next pause begins."""
        await self._waiting.wait()
        self._waiting.clear()
        self._ticks.put_nowait(None)
        await asyncio.wait_for(self._waiting.wait(), PATIENCE_S)


async def test_watching_finds_versions_and_tries_failed_ones_again_with_pauses(tmp_path: Path) -> None:
    loader = Broken("nann/2")
    registry = make(make_repository(tmp_path, nann=["1"]), loader, poll_interval_s=3)
    await registry.load()
    ticks = Ticks()
    watching = asyncio.create_task(registry.keep_watching(sleep=ticks.sleep))
    await ticks.look()
    assert loader.tries == ["nann/1"]
    make_repository(tmp_path, nann=["2"])
    tried_at_s = []
    for second in range(101):
        tries = len(loader.tries)
        await ticks.look()
        if len(loader.tries) > tries:
            tried_at_s.append(second)
        registry.time.advance(1)  # type: ignore[attr-defined]
    assert tried_at_s == [0, 10, 30, 70]
    assert set(ticks.pauses) == {3}
    loader.broken.clear()
    registry.time.advance(600)  # type: ignore[attr-defined]
    await ticks.look()
    assert registry.served().version == 2
    watching.cancel()
    await registry.close()


async def test_an_unreadable_repository_changes_nothing(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "models", nann=["1"])
    registry = make(repository, Loader())
    await registry.load()
    ticks = Ticks()
    watching = asyncio.create_task(registry.keep_watching(sleep=ticks.sleep))
    for absent in (repository / "nann" / "1", repository / "nann", repository):
        absent.rmdir()
        await ticks.look()
        assert registry.served().version == 1
    with pytest.raises(Unavailable, match="cannot be read") as error:
        await registry.rescan()
    assert str(tmp_path) not in str(error.value)
    watching.cancel()
    await registry.close()


async def test_models_come_and_go_with_their_directories(tmp_path: Path) -> None:
    loader = Loader()
    registry = make(make_repository(tmp_path, nann=["1"]), loader)
    await registry.load()
    make_repository(tmp_path, other=["4"])
    await registry.rescan()
    assert registry.models() == ("nann", "other")
    (tmp_path / "nann" / "1").rmdir()
    (tmp_path / "nann").rmdir()
    await registry.rescan()
    assert registry.models() == ("other",)
    await until(lambda: loader.engines["nann/1"].closed)
    with pytest.raises(UnknownModel):
        registry.served("nann")
    await registry.close()


# One in place of the other


async def test_unload_first_makes_room_before_it_loads(tmp_path: Path) -> None:
    events: list[str] = []

    class Watched(FakeEngine):
        def close(self) -> None:
            events.append(f"closed {self.manifest.version}")

    def load(path: Path) -> Any:
        events.append(f"loaded {path.name}")
        return Watched(version=int(path.name))

    registry = make(make_repository(tmp_path, nann=["1"]), load, swap_order="unload-first")
    await registry.load()
    make_repository(tmp_path, nann=["2"])
    write_empty_manifest(tmp_path / "nann" / "2")
    await registry.rescan()
    assert events == ["loaded 1", "closed 1", "loaded 2"]
    await registry.close()


def write_empty_manifest(version_dir: Path) -> None:
    fields = {"model_name": "nann", "model_type": "x", "item_id_type": "int", "user_id_type": "int"}
    numbers = {"num_items": 1, "embedding_dim": 1, "history_length": 1, "input_dim": 1}
    write_manifest(
        version_dir,
        Manifest(format_version=FORMAT_VERSION, user_tensors={}, item_tensors={}, **fields, **numbers),  # type: ignore[arg-type]
    )


async def test_unload_first_keeps_the_old_version_when_the_new_one_is_damaged(tmp_path: Path) -> None:
    loader = Loader()
    registry = make(make_repository(tmp_path, nann=["1"]), loader, swap_order="unload-first")
    await registry.load()
    make_repository(tmp_path, nann=["2"])
    await registry.rescan()
    assert registry.served().version == 1
    assert not loader.engines["nann/1"].closed
    assert "nann/2" not in loader.engines
    assert registry.status("nann")[0].state == "END"
    await registry.close()


async def test_unload_first_goes_back_to_the_old_version_once(tmp_path: Path) -> None:
    loader = Broken("nann/2")
    registry = make(make_repository(tmp_path, nann=["1"]), loader, swap_order="unload-first")
    await registry.load()
    make_repository(tmp_path, nann=["2"])
    write_empty_manifest(tmp_path / "nann" / "2")
    ticks = Ticks()
    watching = asyncio.create_task(registry.keep_watching(sleep=ticks.sleep))
    for _ in range(3):
        await ticks.look()
        registry.time.advance(10_000)  # type: ignore[attr-defined]
    assert loader.tries == ["nann/1", "nann/2", "nann/1"]
    assert registry.served().version == 1
    watching.cancel()
    await registry.close()


# Room


def roomy(repository: Path, loader: Any, available: int | None, **settings: Any) -> Registry:
    fields = Settings(repository=repository, **settings)
    versions = VersionLoader(fields, loader, available=lambda: available)
    return Registry(fields, Metrics(), loader=versions)


async def test_a_version_that_would_not_fit_is_refused_beside_others_only(tmp_path: Path) -> None:
    make_repository(tmp_path, nann=["1"])
    write_empty_manifest(tmp_path / "nann" / "1")
    registry = roomy(tmp_path, Loader(), available=1 << 20)
    await registry.load()
    make_repository(tmp_path, nann=["2"])
    write_empty_manifest(tmp_path / "nann" / "2")
    await registry.rescan()
    assert registry.served().version == 1
    refused = registry.status("nann")[0]
    assert (refused.version, refused.error_code) == (2, "RESOURCE_EXHAUSTED")
    assert "unload-first" in refused.error_message
    await registry.close()


@pytest.mark.parametrize(("available", "settings"), [(None, {}), (1 << 40, {}), (0, {"check_memory": False})])
async def test_a_version_is_loaded_where_there_is_room_or_nobody_asks(
    tmp_path: Path, available: int | None, settings: dict[str, Any]
) -> None:
    make_repository(tmp_path, nann=["1"])
    registry = roomy(tmp_path, Loader(), available, **settings)
    await registry.load()
    make_repository(tmp_path, nann=["2"])
    write_empty_manifest(tmp_path / "nann" / "2")
    await registry.rescan()
    assert registry.served().version == 2
    await registry.close()


# Configuration and labels


def labelled(base_path: Path, policy: VersionPolicy, **labels: int) -> list[ModelConfig]:
    return [ModelConfig("nann", base_path, policy, labels)]


async def test_labels_name_versions_that_are_served(tmp_path: Path) -> None:
    registry = make(make_repository(tmp_path, nann=["1", "2"]), Loader())
    await registry.load()
    everything = VersionPolicy(latest=None)
    await registry.reload(labelled(tmp_path / "nann", everything, stable=1, canary=2))
    assert registry.served("nann", label="stable").version == 1
    assert registry.served("nann", label="canary").version == 2
    assert registry.served("nann").version == 2
    assert registry.status("nann", label="stable") == [VersionStatus(1, "AVAILABLE")]
    with pytest.raises(UnknownLabel, match="Unrecognized servable version label: best"):
        registry.served("nann", label="best")
    with pytest.raises(FailedPrecondition, match="assign label to version 9 of model nann"):
        await registry.reload(labelled(tmp_path / "nann", everything, stable=9))
    assert registry.served("nann", label="stable").version == 1
    await registry.reload(labelled(tmp_path / "nann", VersionPolicy(), stable=2))
    assert registry.served("nann", label="stable").version == 2
    with pytest.raises(UnknownLabel):
        registry.served("nann", label="canary")
    await registry.close()


async def test_a_reload_changes_the_models_or_nothing(tmp_path: Path) -> None:
    make_repository(tmp_path, nann=["1"], other=["3"], empty=[".tmp"])
    elsewhere = make_repository(tmp_path.parent / f"{tmp_path.name}-elsewhere", nann=["1"])
    loader = Loader()
    registry = make(tmp_path, loader, model="nann")
    await registry.load()
    for configs, error in [
        ([ModelConfig("nann", tmp_path / "nann"), ModelConfig("x", tmp_path / "empty")], FailedPrecondition),
        ([ModelConfig("x", tmp_path / "gone")], FailedPrecondition),
        ([ModelConfig("x", elsewhere / "nann")], PermissionDenied),
        ([ModelConfig("x", Path("../") / elsewhere.name / "nann")], PermissionDenied),
        ([ModelConfig("nann", tmp_path / "nann" / ".." / "renamed")], FailedPrecondition),
    ]:
        with pytest.raises(error) as caught:
            await registry.reload(configs)
        assert str(tmp_path) not in str(caught.value)
        assert registry.models() == ("nann",)
    (tmp_path / "renamed").mkdir()
    make_repository(tmp_path, renamed=["1"])
    with pytest.raises(FailedPrecondition, match="is served from elsewhere"):
        await registry.reload([ModelConfig("nann", tmp_path / "renamed")])
    await registry.reload([ModelConfig("second", Path("other"))])
    assert registry.models() == ("second",)
    await until(lambda: loader.engines["nann/1"].closed)
    await registry.rescan()
    assert registry.models() == ("second",)
    await registry.close()


async def test_a_reload_tells_what_did_not_load(tmp_path: Path) -> None:
    registry = make(make_repository(tmp_path, nann=["1"]), Broken("nann/2"))
    await registry.load()
    make_repository(tmp_path, nann=["2"])
    with pytest.raises(Unavailable, match="nann version 2: out of memory"):
        await registry.reload([ModelConfig("nann", tmp_path / "nann")])
    assert registry.served().version == 1
    await registry.close()


# The model config file, read again


def config_text(**base_paths: str) -> str:
    models = "".join(f'config {{ name: "{name}" base_path: "{path}" }} ' for name, path in base_paths.items())
    return f"model_config_list {{ {models} }}"


async def test_a_model_config_file_is_followed(tmp_path: Path) -> None:
    make_repository(tmp_path, a=["1"], b=["1"])
    file = tmp_path / "models.config"
    file.write_text(config_text(a="a"), encoding="utf-8")
    loader = Loader()
    registry = make(tmp_path, loader, model_config_file=file, model_config_poll_interval_s=5)
    await registry.load()
    ticks = Ticks()
    reading = asyncio.create_task(registry.keep_reading_config(sleep=ticks.sleep))
    await ticks.look()
    assert set(loader.engines) == {"a/1"}
    refused = partial(sample, registry, "nann_file_refused", file="model_config")
    assert refused() == 0
    file.write_text(config_text(a="a", b="b"), encoding="utf-8")
    await ticks.look()
    assert registry.models() == ("a", "b")
    with capture_logs() as lines:
        for wrong in (
            "model_config_list { config { naem: 1 } }",
            config_text(b="b", c="c"),
            config_text(b="a"),
        ):
            file.write_text(wrong, encoding="utf-8")
            await ticks.look()
            await ticks.look()
            assert registry.models() == ("a", "b")
            assert refused() == 1
    assert [line["log_level"] for line in lines] == ["error"] * 3
    file.unlink()
    await ticks.look()
    assert registry.served("b").version == 1
    file.write_text(config_text(b="b", c="c"), encoding="utf-8")
    make_repository(tmp_path, c=["4"])  # what it names has come
    await ticks.look()
    assert set(registry.models()) == {"b", "c"}
    assert refused() == 0
    assert set(ticks.pauses) == {5}
    reading.cancel()
    await registry.close()


async def test_an_unchanged_model_config_file_leaves_a_reload_alone(tmp_path: Path) -> None:
    make_repository(tmp_path, a=["1"], b=["1"])
    file = tmp_path / "models.config"
    file.write_text(config_text(a="a"), encoding="utf-8")
    registry = make(tmp_path, Loader(), model_config_file=file, model_config_poll_interval_s=5)
    await registry.load()
    await registry.reload([ModelConfig("b", tmp_path / "b")])
    ticks = Ticks()
    reading = asyncio.create_task(registry.keep_reading_config(sleep=ticks.sleep))
    await ticks.look()
    assert registry.models() == ("b",)
    file.write_text(config_text(a="a") + "  # with a word more", encoding="utf-8")
    await ticks.look()
    assert registry.models() == ("b",)
    reading.cancel()
    await registry.close()


async def test_a_model_config_file_may_name_directories_anywhere_and_so_may_reloads_then(
    tmp_path: Path,
) -> None:
    make_repository(tmp_path / "first", a=["1"])
    elsewhere = make_repository(tmp_path / "second", b=["1"], d=["1"])
    file = tmp_path / "first" / "models.config"
    file.write_text(config_text(a="a"), encoding="utf-8")
    registry = make(tmp_path / "first", Loader(), model_config_file=file, model_config_poll_interval_s=5)
    await registry.load()
    with pytest.raises(PermissionDenied):
        await registry.reload([ModelConfig("d", elsewhere / "d")])
    ticks = Ticks()
    reading = asyncio.create_task(registry.keep_reading_config(sleep=ticks.sleep))
    file.write_text(config_text(b=str(elsewhere / "b")), encoding="utf-8")
    await ticks.look()
    assert registry.models() == ("b",)
    await registry.reload([ModelConfig("d", elsewhere / "d")])
    assert registry.models() == ("d",)
    reading.cancel()
    await registry.close()


async def test_what_a_new_model_config_file_names_and_does_not_load_is_told(tmp_path: Path) -> None:
    make_repository(tmp_path, a=["1"], b=["1"])
    file = tmp_path / "models.config"
    file.write_text(config_text(a="a"), encoding="utf-8")
    registry = make(tmp_path, Broken("b/1"), model_config_file=file, model_config_poll_interval_s=5)
    await registry.load()
    ticks = Ticks()
    reading = asyncio.create_task(registry.keep_reading_config(sleep=ticks.sleep))
    file.write_text(config_text(a="a", b="b"), encoding="utf-8")
    with capture_logs() as lines:
        await ticks.look()
    assert "not all of the model config file is served" in [line["event"] for line in lines]
    assert registry.status("b")[0].state == "END"
    assert registry.served("a").version == 1
    assert sample(registry, "nann_file_refused", file="model_config") == 0
    reading.cancel()
    await registry.close()


def test_a_pause_between_looks_needs_a_file_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs model_config_file"):
        Settings(repository=tmp_path, model_config_poll_interval_s=5)


# Who asks, and the end


async def test_a_change_goes_on_when_its_caller_has_gone(tmp_path: Path) -> None:
    go = threading.Event()
    loader = Loader()

    def slow(path: Path) -> Any:
        if path.name == "2":
            assert go.wait(PATIENCE_S)
        return loader(path)

    registry = make(make_repository(tmp_path, nann=["1"]), slow)
    await registry.load()
    make_repository(tmp_path, nann=["2"])
    caller = asyncio.create_task(registry.rescan())
    await until(lambda: registry.loading)
    second = asyncio.create_task(registry.rescan())
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go.set()
    await second
    assert registry.served().version == 2
    assert list(loader.engines) == ["nann/1", "nann/2"]
    await registry.close()


async def test_who_waits_for_a_change_when_the_server_goes_is_told(tmp_path: Path) -> None:
    go = threading.Event()
    loader = Loader()

    def slow(path: Path) -> Any:
        if path.name == "2":
            assert go.wait(PATIENCE_S)
        return loader(path)

    registry = make(make_repository(tmp_path, nann=["1"]), slow)
    await registry.load()
    make_repository(tmp_path, nann=["2"])
    waiting = [asyncio.create_task(registry.rescan()) for _ in range(2)]
    await until(lambda: registry.loading)
    registry.refuse_changes()
    for caller in waiting:
        with pytest.raises(NotReady, match="going away"):
            await caller
    with pytest.raises(NotReady, match="going away"):
        await registry.rescan()
    assert registry.loading
    await registry.close()
    go.set()


async def test_lanes_of_a_version_that_drains_concern_nobody(tmp_path: Path) -> None:
    loader = Loader()
    registry = make(make_repository(tmp_path, nann=["1"]), loader)
    heard: list[tuple[int, int, int]] = []
    registry.subscribe(lambda _model, version, *, proven, lanes: heard.append((version, proven, lanes)))
    await registry.load()
    old = registry.served()
    loader.engines["nann/1"].search_error = BackendError("lost")
    with old.lease():
        with pytest.raises(BackendError):
            await old.batcher.submit(old.engine.check(Query(k=1, params=SearchParams(), history=(1,))))
        assert heard == [(1, 0, 2)]
        make_repository(tmp_path, nann=["2"])
        await registry.rescan()
        await settle()
        assert heard == [(1, 0, 2), (1, 0, 0)]
        with pytest.raises((BackendError, NotReady)):
            await old.batcher.submit(old.engine.check(Query(k=1, params=SearchParams(), history=(1,))))
        assert heard == [(1, 0, 2), (1, 0, 0)]
    await registry.close()
