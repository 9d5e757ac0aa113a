from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from certificates import Authority
from structlog.testing import capture_logs

from nann.service.metrics import Metrics
from nann.service.settings import Settings, SettingsError, load_settings
from nann.service.tls import Tls, open_tls


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


def test_none_is_asked_for(tmp_path: Path) -> None:
    assert open_tls(Settings(repository=tmp_path), Metrics()) is None


@pytest.mark.parametrize("given", ["tls_cert_file", "tls_key_file", "tls_client_ca_file"])
def test_half_of_it(given: str) -> None:
    with pytest.raises(SettingsError, match="tls_cert_file and tls_key_file"):
        load_settings({}, repository="r", **{given: "file"})


def test_files_that_cannot_be_used(tmp_path: Path, authority: Authority) -> None:
    good, other = authority.issue("good"), authority.issue("other")
    words = tmp_path / "words"
    words.write_text("no certificate", encoding="utf-8")
    for cert, key in ((tmp_path / "none", good.key), (words, good.key), (good.cert, other.key)):
        with pytest.raises(SettingsError, match="--tls-cert-file"):
            Tls(cert, key, None, Metrics())
    for ca in (tmp_path / "none", words):
        with pytest.raises(SettingsError, match="--tls-client-ca-file"):
            Tls(good.cert, good.key, ca, Metrics())


def test_an_encrypted_key_asks_nobody_for_a_password(tmp_path: Path, authority: Authority) -> None:
    good = authority.issue("good")
    encrypted = tmp_path / "encrypted"
    command = ["openssl", "pkey", "-in", good.key, "-aes128", "-passout", "pass:words", "-out", encrypted]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(SettingsError, match="encrypted"):
        Tls(good.cert, encrypted, None, Metrics())


def test_a_new_certificate_is_read_once_and_a_bad_one_is_not_used(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files = authority.issue("server")
    metrics = Metrics()
    tls = Tls(files.cert, files.key, None, metrics)
    first = tls.pem
    tls.refresh()
    assert tls.pem is first
    authority.issue("server")
    tls.refresh()
    second = tls.pem
    assert second.cert == files.cert.read_bytes() != first.cert
    files.cert.write_text("half of one", encoding="utf-8")
    with capture_logs() as lines:
        tls.refresh()
        tls.refresh()
    assert tls.pem is second
    assert [line["log_level"] for line in lines] == ["error"]
    assert metrics.registry.get_sample_value("nann_file_refused", {"file": "certificate"}) == 1
