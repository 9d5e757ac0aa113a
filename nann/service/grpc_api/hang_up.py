"""Closes the connections of a port at once, each after what has been written to it.

When gRPC's server stops, its core ends with CANCELLED what it has received and not yet handed over, and that
status does not tell a caller that the call may be sent again. A connection that ends does (UNAVAILABLE). gRPC
has no call for it, so the sockets are found among the process's own files.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Final

__all__ = ["hang_up"]

# The process's open files, on Linux and macOS.
_FILES: Final = Path("/dev/fd")


def hang_up(port: int) -> None:
    """End every TCP connection of this process whose own port is `port`; waits for nothing.

    The port goes on listening: a socket that stops to would make gRPC log an error. So stop its server
    before anything else runs.
    """
    for file in _FILES.iterdir() if _FILES.is_dir() else ():
        number = int(file.name)
        with contextlib.suppress(OSError):  # closed since, not connected, or the caller was faster
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as ours:
                    if _is_connection(ours) and ours.getsockname()[1] == port:
                        ours.shutdown(socket.SHUT_RDWR)


def _is_connection(ours: socket.socket) -> bool:
    if ours.family not in (socket.AF_INET, socket.AF_INET6) or ours.type != socket.SOCK_STREAM:
        return False
    return not ours.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
