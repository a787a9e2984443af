"""Ports on the loopback interface."""

import socket

from components.core.errors import InputError


def check_port(port: int) -> None:
    """Refuse a port that something else listens on.

    Raises:
        InputError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise InputError(f"port {port} is taken", hint=f"choose another, e.g. --port {port + 1}") from None
