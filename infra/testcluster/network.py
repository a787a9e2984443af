"""The network namespace in which the whole cluster runs; the host's own addresses, rules and ports stay untouched.

The namespace has no way out. The bridge exists before any pod does, so that host processes can listen on its address.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from infra.testcluster.layout import API_SERVICE, BRIDGE, GATEWAY, NETWORK_NAMESPACE, POD_NETWORK, SERVICE_NETWORK

NAMESPACE_FILE = Path("/run/netns") / NETWORK_NAMESPACE
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")


def make_namespace() -> None:
    """Make the namespace where there is none."""
    if not NAMESPACE_FILE.exists():
        _run("ip", "netns", "add", NETWORK_NAMESPACE)


def remove_namespace() -> None:
    """Remove the namespace; its interfaces go with it."""
    if NAMESPACE_FILE.exists():
        _run("ip", "netns", "delete", NETWORK_NAMESPACE)


def inside_namespace() -> bool:
    """Whether this process runs in the namespace."""
    return NAMESPACE_FILE.exists() and Path("/proc/self/ns/net").stat().st_ino == NAMESPACE_FILE.stat().st_ino


def run_inside(command: Sequence[str]) -> NoReturn:
    """Replace this process with a command that runs in the namespace.

    `ip netns exec` is no way to do it: it mounts a new /sys, in which a kubelet finds no control groups.
    """
    sys.stdout.flush()
    os.execvpe("nsenter", ["nsenter", f"--net={NAMESPACE_FILE}", *command], without_proxies(dict(os.environ)))


def without_proxies(environment: dict[str, str]) -> dict[str, str]:
    """An environment in which no program sends requests for the cluster to a proxy outside of it."""
    return {name: value for name, value in environment.items() if name.lower() not in PROXY_VARIABLES}


def set_up_addresses() -> None:
    """Give the namespace its bridge and addresses; what is there already stays."""
    _run("ip", "link", "set", "lo", "up")
    if BRIDGE not in _links():
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
    _run("ip", "address", "replace", f"{GATEWAY}/{POD_NETWORK.split('/')[1]}", "dev", BRIDGE)
    _run("ip", "link", "set", BRIDGE, "up")
    # Pods reach the API server at its service address without any translation.
    _run("ip", "address", "replace", f"{API_SERVICE}/32", "dev", "lo")
    # Without a route, host processes get an error before kube-proxy's rules see the packet.
    _run("ip", "route", "replace", SERVICE_NETWORK, "dev", BRIDGE)
    _run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
    if Path("/proc/sys/net/bridge/bridge-nf-call-iptables").exists():
        _run("sysctl", "-q", "-w", "net.bridge.bridge-nf-call-iptables=1")


def _links() -> str:
    return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
