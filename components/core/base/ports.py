"""Ports on the loopback interface, and clients that reach them without a proxy."""

import os
import random
import socket
from pathlib import Path

from components.core.base.errors import InputError

HOST = "127.0.0.1"
LOOPBACK_NAMES = (HOST, "localhost", "::1")
OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""First and last port that Linux gives to outgoing connections."""
FIRST_PORT, FIRST_DYNAMIC_PORT = 20_000, 49_152
"""First port that is chosen, above those of most services; the first that is dynamic by RFC 6335, section 6."""


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
    """The wanted port, or any free one where None or 0 is wanted.

    The system gives a connection to elsewhere a port of a range of its own. A free port of that range may be taken
    while a server that shall have it still loads, so one below the range is preferred.

    Raises:
        InputError: the port is in use, or opening it needs more rights.
    """
    try:
        return _bound_port(wanted) if wanted else _free_port()
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "there are no more than 65535"
        raise InputError(f"port {wanted} cannot be used: {reason}", hint="choose another, e.g. --port 8123") from None


def is_free(port: int) -> bool:
    """Whether no process listens on a port."""
    try:
        return _bound_port(port) == port
    except OSError:
        return False


def _free_port() -> int:
    """A free port that no outgoing connection gets, or any where none is found."""
    try:
        end = int(OUTGOING_PORTS.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        end = FIRST_DYNAMIC_PORT
    choose = random.SystemRandom()  # another process with the same seed would choose the same ports
    for _ in range(100 if end > FIRST_PORT else 0):
        if is_free(port := choose.randrange(FIRST_PORT, end)):
            return port
    return _bound_port(0)


def _bound_port(port: int) -> int:
    """Bind a port for a moment (any free one if 0); returns its number."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
        number: int = probe.getsockname()[1]
        return number
