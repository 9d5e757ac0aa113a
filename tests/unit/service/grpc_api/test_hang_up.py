"""Connections of one port end, or nobody can make another; nothing else happens."""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack

import pytest

from nann.service.grpc_api.hang_up import hang_up, let_nobody_in


def _connected(listener: socket.socket, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    caller = stack.enter_context(socket.create_connection(listener.getsockname()[:2], timeout=10))
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


@pytest.mark.skipif(sys.platform != "linux", reason="a packet filter of Linux")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_who_is_connected_stays_and_nobody_else_comes_in(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        listener, other = (
            stack.enter_context(socket.create_server((host, 0), family=family)) for _ in range(2)
        )
        port = listener.getsockname()[1]
        before, caller = _connected(listener, stack)
        waiting = stack.enter_context(socket.create_connection((host, port), timeout=10))
        let_nobody_in(port)
        before.sendall(b"still here")
        assert caller.recv(100) == b"still here"
        _connected(other, stack)
        taken_up, _ = listener.accept()
        waiting.sendall(b"me too")
        assert stack.enter_context(taken_up).recv(100) == b"me too"
        with pytest.raises(TimeoutError):
            socket.create_connection((host, port), timeout=0.3)
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=10)
