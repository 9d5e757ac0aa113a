"""Closes a port that gRPC serves, so that no caller takes its end for an answer.

When gRPC's server stops, its core ends with CANCELLED what it has received and not yet handed over, and that
status does not tell a caller that the call may be sent again. A connection that ends does (UNAVAILABLE). gRPC
has no call for it, so the sockets are found among the process's own files.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["hang_up", "let_nobody_in"]

# The process's open files, on Linux and macOS.
_FILES: Final = Path("/dev/fd")

# A packet filter of one instruction, "keep 0 bytes" (linux/filter.h: BPF_RET | BPF_K, 0).
_DROP: Final = struct.pack("=HBBI", 0x06, 0, 0, 0)
_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h; not in the socket module


def let_nobody_in(port: int) -> None:
    """Have the system drop what asks for a new connection to `port`, on Linux; waits for nothing.

    Callers ask again after a second, and are refused when nobody listens any more. A socket that stopped to
    listen would refuse them now, and make gRPC log an error.
    """
    if sys.platform != "linux":
        return
    code = ctypes.create_string_buffer(_DROP, len(_DROP))
    program = struct.pack("@HP", 1, ctypes.addressof(code))  # struct sock_fprog
    for ours in _sockets(port, listening=True):
        with contextlib.suppress(OSError):  # closed since
            ours.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def hang_up(port: int) -> None:
    """End every TCP connection of this process whose own port is `port`; waits for nothing.

    Connections that come later stay, so stop the server before anything else runs.
    """
    for ours in _sockets(port, listening=False):
        with contextlib.suppress(OSError):  # the caller was faster
            ours.shutdown(socket.SHUT_RDWR)


def _sockets(port: int, *, listening: bool) -> Iterator[socket.socket]:
    """The process's TCP sockets on `port` that listen, or are connections, each open until the next."""
    for file in _FILES.iterdir() if _FILES.is_dir() else ():
        number = int(file.name)
        with contextlib.suppress(OSError):  # closed since, or not connected
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as ours:
                    tcp = ours.family in (socket.AF_INET, socket.AF_INET6) and ours.type == socket.SOCK_STREAM
                    if tcp and ours.getsockname()[1] == port and _listens(ours) == listening:
                        yield ours


def _listens(ours: socket.socket) -> bool:
    return bool(ours.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
