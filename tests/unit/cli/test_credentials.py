from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from nann.cli.credentials import API_KEY_VARIABLE, CREDENTIAL_FLAGS, Credentials, credentials_of
from nann.service.settings import load_settings

KEY = "q0gJ5mYt0bVf0mC2m1XbqC0m"
TLS_URL = "https://server:8501"


def flags(**given: Path) -> dict[str, Any]:
    return dict.fromkeys((flag.name for flag in CREDENTIAL_FLAGS), None) | given


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)


def test_none_are_given() -> None:
    assert credentials_of(flags(), "http://server") == Credentials()
    assert Credentials().headers == {}


def test_a_key_comes_from_a_file_or_else_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    assert credentials_of(flags(), None).headers == {"authorization": f"Bearer {KEY}"}
    file = tmp_path / "key"
    file.write_text("another-key\n", encoding="utf-8")
    assert credentials_of(flags(api_key_file=file), None).headers == {"authorization": "Bearer another-key"}
    assert "another-key" not in repr(credentials_of(flags(api_key_file=file), None))


def test_a_server_starts_where_the_variable_of_the_key_is_set() -> None:
    assert load_settings({API_KEY_VARIABLE: KEY}, repository="r").api_keys_file is None


@pytest.mark.parametrize("text", ["", "shop read some-key", "a\nb", "é"])
def test_what_is_no_key_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    file = tmp_path / "key"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(typer.BadParameter, match="must hold one key") as caught:
        credentials_of(flags(api_key_file=file), None)
    assert not text or text not in str(caught.value)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for given, url, problem in [
        ({"client_cert_file": file}, TLS_URL, "together"),
        ({"client_key_file": file}, TLS_URL, "together"),
        ({"ca_file": tmp_path / "none"}, TLS_URL, "--ca-file .* no such file"),
        ({"api_key_file": tmp_path}, TLS_URL, "--api-key-file .* no such file"),
        ({"ca_file": file}, "http://server", "--ca-file is for https"),
        ({"ca_file": file}, None, "--ca-file is for https"),
        ({"client_cert_file": file, "client_key_file": file}, "grpc://server", "--client-cert-file is for"),
    ]:
        with pytest.raises(typer.BadParameter, match=problem):
            credentials_of(flags(**given), url)
    both = credentials_of(flags(client_cert_file=file, client_key_file=file), "grpcs://server")
    assert both.client_cert == (file, file)
