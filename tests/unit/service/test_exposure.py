from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from nann.service.access import Access, ApiKey, Role
from nann.service.exposure import warn_of_exposure
from nann.service.settings import Settings

KEYS = Access((ApiKey("shop", Role.READ, b"x" * 32),))
TLS: dict[str, Any] = {"tls_cert_file": "cert", "tls_key_file": "key"}


@pytest.mark.parametrize(
    ("host", "access", "more", "warnings"),
    [
        ("127.0.0.1", Access(), {}, []),
        ("::1", Access(), {}, []),
        ("localhost", Access(), {}, []),
        ("0.0.0.0", Access(), {}, ["ANYONE", "IN CLEAR"]),
        ("::", Access(), {}, ["ANYONE", "IN CLEAR"]),
        ("nann.example", Access(), {}, ["ANYONE", "IN CLEAR"]),
        ("0.0.0.0", KEYS, {}, ["IN CLEAR"]),
        ("0.0.0.0", Access(), TLS, ["ANYONE"]),
        ("0.0.0.0", Access(), {**TLS, "tls_client_ca_file": "ca"}, []),
        ("0.0.0.0", KEYS, TLS, []),
    ],
)
def test_who_is_warned(
    tmp_path: Path, host: str, access: Access, more: dict[str, Any], warnings: list[str]
) -> None:
    with capture_logs() as lines:
        warn_of_exposure(Settings(repository=tmp_path, host=host, **more), access)
    assert len(lines) == len(warnings)
    for line, words in zip(lines, warnings, strict=True):
        assert line["log_level"] == "warning"
        assert words in line["event"]
