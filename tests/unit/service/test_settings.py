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
        ({"repository": "r", "device": "tpu"}, r"--device \(NANN_DEVICE\).*'tpu' names no devices"),
        ({"repository": "r", "device": "cuda:0,cuda:0"}, "names a device twice"),
        ({"repository": "r", "device": "cpu,cuda:0"}, "names no devices"),
        ({"repository": "r", "device_memory_limit": "most"}, r"--device-memory-limit.*bytes \(20GiB\)"),
        ({"repository": "r", "xla_memory_fraction": 1.5}, "--xla-memory-fraction"),
        ({"repository": "r", "wings": 2}, "--wings"),
        ({"repository": "r", "queue_limit": 8}, "could never be admitted"),
        ({"repository": "r", "rest_port": 70000}, "65535"),
    ],
)
def test_wrong_settings_name_the_flag_and_the_variable(flags: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings({}, **flags)


TF_SERVING = [
    # The first seed: -p 8501:8501 -p 8500:8500 --mount …,target=/models/nann -e MODEL_NAME=nann
    ({"MODEL_NAME": "nann"}, {}, ("/models", "nann")),
    # The fifth: -e MODEL_BASE_PATH=$(pwd)/tf_model -e MODEL_NAME=din
    ({"MODEL_NAME": "din", "MODEL_BASE_PATH": "/home/me/tf_model"}, {}, ("/home/me/tf_model", "din")),
    ({"MODEL_BASE_PATH": "/models"}, {}, ("/models", None)),
    ({"MODEL_NAME": "x"}, {"repository": "r"}, ("r", None)),
    ({"MODEL_NAME": "x", "NANN_REPOSITORY": "r"}, {}, ("r", None)),
    ({"MODEL_NAME": "x", "NANN_MODEL": "nann"}, {}, ("/models", "nann")),
    ({"MODEL_NAME": "x"}, {"model": "nann"}, ("/models", "nann")),
    ({"MODEL_NAME": "x"}, {"model_config_file": "/etc/nann/models.config"}, ("/etc/nann", None)),
]


@pytest.mark.parametrize(("environ", "flags", "expected"), TF_SERVING, ids=range(len(TF_SERVING)))
def test_the_variables_of_tensorflow_servings_container(
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    flags: dict[str, str],
    expected: tuple[str, str | None],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(**flags)
    assert (str(settings.repository), settings.model) == expected
    assert (settings.rest_port, settings.grpc_port) == (8501, 8500)


def test_passwords_are_hidden_when_printed() -> None:
    settings = load_settings(repository="r", user_store="redis://me:hunter2@host:6379/0")
    printed = settings.printable()
    assert printed["user_store"] == "redis://me:**********@host:6379/0"
    assert "hunter2" not in str(printed)
    assert printed["repository"] == "r"
    assert set(printed) == set(Settings.model_fields)


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("redis://:hunter2@host/0", "redis://:**********@host/0"),
        ("rediss://me:hunter2#/@host", "rediss://me:**********@host"),
        ("redis://host/0?password=hunter2&db=1", "redis://host/0?password=**********&db=1"),
        ("rediss://host?ssl_password=hunter2", "rediss://host?ssl_password=**********"),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
def test_a_password_is_hidden_wherever_a_url_has_it(url: str, printed: str) -> None:
    assert load_settings(repository="r", user_store=url).printable()["user_store"] == printed


def test_the_caches_follow_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    settings = load_settings(repository="r")
    assert settings.xla_cache_dir == Path("/somewhere/nann/xla")
    assert settings.kernel_cache_dir == Path("/somewhere/nann/cupy")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3", "cuda:0,cuda:1"])
def test_devices_that_may_be_written(device: str) -> None:
    assert load_settings({}, repository="r", device=device).device == device
