"""Connections of one port end; nothing else does."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from nann.service.grpc_api.hang_up import hang_up


def _connected(listener: socket.socket, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    caller = stack.enter_context(socket.create_connection(listener.getsockname(), timeout=10))
    ours, _ = listener.accept()
    return stack.enter_context(ours), caller


def test_what_was_written_arrives_and_then_the_end() -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        other = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        connections = [_connected(listener, stack) for _ in range(2)]
        spared, spared_caller = _connected(other, stack)
        for ours, _ in connections:
            ours.sendall(b"answer")
        hang_up(listener.getsockname()[1])
        for _, caller in connections:
            assert caller.recv(100) == b"answer"
            assert caller.recv(100) == b""
        spared.sendall(b"still here")
        assert spared_caller.recv(100) == b"still here"
        _connected(listener, stack)


def test_a_port_without_connections_and_files_that_are_no_sockets_do_no_harm() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, open(__file__):  # noqa: PTH123
        hang_up(listener.getsockname()[1])
