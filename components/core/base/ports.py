"""Ports on the loopback interface, and clients that reach them without a proxy."""

import os
import socket

from components.core.base.errors import InputError

HOST = "127.0.0.1"
LOOPBACK_NAMES = (HOST, "localhost", "::1")


def never_proxy_loopback() -> None:
    """Keep requests to this machine from going to a proxy, in this process and those that it starts.

    A proxy is named by variables such as `http_proxy`, which every HTTP library reads, as it reads `no_proxy`. Some
    prefer the variable in capitals, so both get the names.
    """
    hosts = [host.strip() for name in ("no_proxy", "NO_PROXY") for host in os.environ.get(name, "").split(",")]
    if "*" not in hosts:
        hosts = list(dict.fromkeys(filter(None, (*hosts, *LOOPBACK_NAMES))))
        os.environ |= {"no_proxy": ",".join(hosts), "NO_PROXY": ",".join(hosts)}


def usable_port(wanted: int | None) -> int:
    """The wanted port, or any free one where None is wanted.

    Raises:
        InputError: the port is in use, or opening it needs more rights.
    """
    try:
        return _bound_port(wanted or 0)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "there are no more than 65535"
        raise InputError(f"port {wanted} cannot be used: {reason}", hint="choose another, e.g. --port 8123") from None


def is_free(port: int) -> bool:
    """Whether no process listens on a port."""
    try:
        return _bound_port(port) == port
    except OSError:
        return False


def _bound_port(port: int) -> int:
    """Bind a port for a moment (any free one if 0); returns its number."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
        number: int = probe.getsockname()[1]
        return number
