"""What a stopped node leaves behind: containers, their networks, mounts and control groups."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from infra.testcluster.layout import Layout
from infra.testcluster.runner import Runner

PATIENCE_S = 20


def end_containers(runner: Runner, layout: Layout) -> None:
    """End and remove every container of the cluster's containerd, and the network namespaces of its pods."""
    ctr = ("ctr", "--address", str(layout.containerd_socket), "--namespace", "k8s.io")
    deadline = time.monotonic() + PATIENCE_S
    while (tasks := runner.output(*ctr, "tasks", "list", "--quiet").split()) and time.monotonic() < deadline:
        for task in tasks:
            runner.output(*ctr, "tasks", "kill", "--signal", "KILL", task)
            runner.output(*ctr, "tasks", "delete", "--force", task)
    containers = runner.output(*ctr, "containers", "list", "--quiet").split()
    networks = set(_pod_networks(runner.output(*ctr, "containers", "info", container) for container in containers))
    for container in containers:
        runner.output(*ctr, "containers", "delete", container)
    for network in networks:
        subprocess.run(["ip", "netns", "delete", network.name], stderr=subprocess.DEVNULL, check=False)


def release_mounts(layout: Layout) -> None:
    """Unmount what is mounted below the state folder, the innermost first."""
    mounts = [
        part.mountpoint
        for part in psutil.disk_partitions(all=True)
        if Path(part.mountpoint).is_relative_to(layout.state)
    ]
    for mount in sorted(mounts, reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False)


def remove_control_groups() -> None:
    """Remove the empty control groups of pods; one that has a process stays."""
    for pods in Path("/sys/fs/cgroup").glob("*/kubepods"):
        for group in sorted((path for path in pods.rglob("*") if path.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                group.rmdir()
        with contextlib.suppress(OSError):
            pods.rmdir()


def _pod_networks(descriptions: Iterable[str]) -> Iterator[Path]:
    """The named network namespaces in the descriptions of containers."""
    for description in descriptions:
        with contextlib.suppress(json.JSONDecodeError, KeyError):
            for namespace in json.loads(description)["Spec"]["linux"]["namespaces"]:
                if namespace["type"] == "network" and "cni-" in namespace.get("path", ""):
                    yield Path(namespace["path"])
