"""Says at start, loudly, what anyone who reaches this server can do."""

from __future__ import annotations

import ipaddress

from nann.service.access import Access
from nann.service.logs import get_logger
from nann.service.settings import Settings

__all__ = ["warn_of_exposure"]

log = get_logger(__name__)


def warn_of_exposure(settings: Settings, access: Access) -> None:
    """Warn where others than this machine can reach the server without a key, or without TLS."""
    if _is_loopback(settings.host):
        return
    if access.is_open and settings.tls_client_ca_file is None:
        log.warning(
            "ANYONE who reaches this address may query, read and delete users' histories, and change the "
            "models: set --api-keys-file, or let only a proxy that checks callers reach it",
            host=settings.host,
        )
    if settings.tls_cert_file is None:
        log.warning(
            "queries, histories and API keys cross the network IN CLEAR: set --tls-cert-file and "
            "--tls-key-file, or let only a proxy or mesh that encrypts reach it",
            host=settings.host,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
