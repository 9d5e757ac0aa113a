from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from nann.service.settings import Settings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("NANN_"):
            monkeypatch.delenv(name)


def test_the_contract_defaults() -> None:
    settings = load_settings(repository="r")
    assert (settings.host, settings.rest_port, settings.grpc_port) == ("127.0.0.1", 8501, 8500)
    assert (settings.max_k, settings.batch_wait_ms, settings.verify) == (1000, 0.0, "full")
    assert settings.max_body_bytes == settings.max_message_bytes == 8 * 1024 * 1024
    assert (settings.exclude_seen_default, settings.empty_history) == (True, "popular")
    assert settings.user_store_location == "r/users.sqlite3"


def test_a_flag_wins_over_the_environment_which_wins_over_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NANN_REPOSITORY", "/from/env")
    monkeypatch.setenv("NANN_MODEL", "nann")
    monkeypatch.setenv("NANN_LANES", "7")
    settings = load_settings(lanes=3, queue_limit=None)
    assert (settings.repository, settings.model) == (Path("/from/env"), "nann")
    assert (settings.lanes, settings.queue_limit) == (3, 256)


def test_settings_are_frozen() -> None:
    settings = load_settings(repository="r")
    with pytest.raises(ValidationError):
        settings.lanes = 9  # type: ignore[misc]


def test_every_setting_is_described_and_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, field in Settings.model_fields.items():
        assert field.description and field.description.endswith("."), name


def test_unknown_variables_are_refused() -> None:
    with pytest.raises(SettingsError, match="NANN_LANS"):
        load_settings({"NANN_LANS": "3", "OTHER": "x"}, repository="r")
    with pytest.raises(SettingsError, match="NANN_SERVICE_HOSTS"):
        load_settings({"NANN_SERVICE_HOSTS": "1.2.3.4"}, repository="r")
    with pytest.raises(SettingsError, match="NANN_PORT"):
        load_settings({"NANN_PORT": "8501"}, repository="r")  # not a link: somebody meant --rest-port


KUBERNETES = {
    "NANN_SERVICE_HOST": "10.0.0.1",
    "NANN_SERVICE_PORT": "8501",
    "NANN_SERVICE_PORT_REST": "8501",
    "NANN_PORT": "tcp://10.0.0.1:8501",
    "NANN_PORT_8501_TCP": "tcp://10.0.0.1:8501",
    "NANN_PORT_8501_TCP_ADDR": "10.0.0.1",
    "NANN_PORT_8501_TCP_PORT": "8501",
    "NANN_PORT_8501_TCP_PROTO": "tcp",
    # A Service named nann-grpc writes into the name of a setting.
    "NANN_GRPC_SERVICE_HOST": "10.0.0.2",
    "NANN_GRPC_PORT": "tcp://10.0.0.2:8500",
}


def test_kubernetes_service_links_pass_and_set_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(repository="r")
    assert (settings.host, settings.rest_port, settings.grpc_port) == ("127.0.0.1", 8501, 8500)


def test_a_real_port_in_the_same_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANN_GRPC_PORT", "9000")
    assert load_settings(repository="r").grpc_port == 9000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, r"--repository \(NANN_REPOSITORY\) is required"),
        ({"repository": "r", "lanes": 0}, r"--lanes \(NANN_LANES\).*greater than or equal to 1, got 0"),
        ({"repository": "r", "device": "tpu"}, "'auto' or 'cpu'"),
        ({"repository": "r", "wings": 2}, "--wings"),
        ({"repository": "r", "queue_limit": 8}, "could never be admitted"),
        ({"repository": "r", "rest_port": 70000}, "65535"),
    ],
)
def test_wrong_settings_name_the_flag_and_the_variable(flags: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings({}, **flags)


def test_passwords_are_hidden_when_printed() -> None:
    settings = load_settings(repository="r", user_store="redis://me:hunter2@host:6379/0")
    printed = settings.printable()
    assert printed["user_store"] == "redis://me:**********@host:6379/0"
    assert "hunter2" not in str(printed)
    assert printed["repository"] == "r"
    assert set(printed) == set(Settings.model_fields)


def test_the_xla_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert load_settings(repository="r").xla_cache_dir == Path("/somewhere/nann/xla")
