from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from fake_engine import ManualTime

from nann.service.access import Access, Role, bearer_key, open_access, read_api_keys
from nann.service.errors import PermissionDenied, Unauthenticated
from nann.service.metrics import Metrics
from nann.service.settings import Settings, SettingsError

KEY = "q0gJ5mYt0bVf0mC2m1XbqC0m"
OTHER = "another-key-of-24-letters"


def keys_file(directory: Path, text: str) -> Path:
    path = directory / "keys"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_key_in_clear_hashed_and_alone(tmp_path: Path) -> None:
    hashed = hashlib.sha256(OTHER.encode()).hexdigest()
    text = f"# who\n\n  shop  read {KEY}\nmetrics METRICS sha256:{hashed}\nanonymous-key-0123456789\n"
    keys = read_api_keys(keys_file(tmp_path, text))
    assert [(key.name, key.role) for key in keys] == [
        ("shop", Role.READ),
        ("metrics", Role.METRICS),
        ("line-5", Role.WRITE),
    ]
    access = Access(keys)
    assert not access.is_open
    assert access.allow(KEY, Role.READ) == access.allow(KEY, Role.METRICS) == "shop"
    assert access.allow(OTHER, Role.METRICS) == "metrics"
    with pytest.raises(PermissionDenied, match="'shop' has the role read; this needs write"):
        access.allow(KEY, Role.WRITE)
    for wrong in (None, "", KEY + "x", KEY[:-1], hashed, f"sha256:{hashed}", "é\udcff"):
        with pytest.raises(Unauthenticated) as caught:
            access.allow(wrong, Role.METRICS)
        assert not wrong or wrong not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no key"),
        ("# only words\n", "holds no key"),
        ("short", "line 1: a key has at least 22"),
        ("shop read short", "line 1: a key has at least 22"),
        (f"shop reads {KEY}", "line 1: a role is"),
        (f"sh/op read {KEY}", "line 1: a name is"),
        (f"shop {KEY}", "line 1: expected NAME ROLE KEY"),
        (f"shop read {KEY} more", "line 1: expected NAME ROLE KEY"),
        ("shop read sha256:0123", "line 1: after sha256:"),
        (f"a read {KEY}\na write {OTHER}", "two keys are called a"),
        (f"a read {KEY}\nb write {KEY}", "b has the key of another line"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        read_api_keys(keys_file(tmp_path, text))
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        read_api_keys(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="not UTF-8"):
        read_api_keys(tmp_path / "binary")


def test_without_a_file_everyone_may_do_everything(tmp_path: Path) -> None:
    assert open_access(Settings(repository=tmp_path), Metrics()).is_open


@pytest.mark.parametrize(
    ("authorization", "api_key", "found"),
    [
        ("Bearer abc", None, "abc"),
        ("bearer  abc ", "def", "abc"),
        (None, "def", "def"),
        ("Basic abc", None, None),
        ("Bearer", None, None),
        ("Bearer a b", "def", "def"),
        (None, None, None),
    ],
)
def test_where_the_key_is_looked_for(
    authorization: str | None, api_key: str | None, found: str | None
) -> None:
    assert bearer_key(authorization, api_key) == found


def test_keys_are_exchanged_without_a_restart(tmp_path: Path) -> None:
    path = keys_file(tmp_path, f"shop read {KEY}\n")
    metrics, time = Metrics(), ManualTime()
    settings = Settings(repository=tmp_path, api_keys_file=path)
    access = open_access(settings, metrics, clock=lambda: time.now_s)
    assert access.allow(KEY, Role.READ) == "shop"
    keys_file(tmp_path, f"shop write {OTHER}\n")
    time.advance(1.0)
    assert access.allow(OTHER, Role.WRITE) == "shop"
    with pytest.raises(Unauthenticated):
        access.allow(KEY, Role.READ)
    for wrong in ("", f"shop reads {KEY}\n"):  # an empty file must not open the server
        keys_file(tmp_path, wrong)
        time.advance(1.0)
        with pytest.raises(Unauthenticated):
            access.allow(None, Role.READ)
        assert access.allow(OTHER, Role.WRITE) == "shop"
        assert metrics.registry.get_sample_value("nann_file_refused", {"file": "api_keys"}) == 1
    assert not access.is_open


def test_nothing_shows_a_key(tmp_path: Path) -> None:
    path = keys_file(tmp_path, f"shop read {KEY}\n")
    settings = Settings(repository=tmp_path, api_keys_file=path)
    digest = hashlib.sha256(KEY.encode())
    shown = f"{settings!r} {settings.printable()} {open_access(settings, Metrics())!r}"
    assert "shop" in shown
    for secret in (KEY, digest.hexdigest(), repr(digest.digest())):
        assert secret not in shown
