"""Addresses of the test cluster and the folders that hold its binaries and its state."""

import os
from dataclasses import dataclass
from pathlib import Path

NETWORK_NAMESPACE = "tessera-testcluster"
BRIDGE = "cni0"
GATEWAY = "10.88.0.1"
"""Address of the node and of every process that pods reach; it is the bridge's."""
POD_NETWORK = "10.88.0.0/16"
SERVICE_NETWORK = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
API_URL = "https://127.0.0.1:443"
DNS_DOMAIN = "cluster.local"
NODE = "node1"
POOL_LABEL = "tessera.dev/pool"
MAX_SOCKET_PATH = 107


class TestClusterError(Exception):
    """Something the test cluster needs is missing, or a part of it did not start; the message says the way out."""

    __test__ = False


@dataclass(frozen=True)
class Layout:
    """Folders below one root: `bin` is a cache that survives, `state` is what `down --wipe` removes."""

    root: Path

    @classmethod
    def from_environment(cls) -> "Layout":
        """The folder that TESSERA_TESTCLUSTER names, or one in the user's cache."""
        root = os.environ.get("TESSERA_TESTCLUSTER") or Path.home() / ".cache" / "tessera" / "testcluster"
        layout = cls(Path(root).absolute())
        if len(str(layout.containerd_socket)) > MAX_SOCKET_PATH:
            raise TestClusterError(
                f"the path {layout.containerd_socket} is too long for a Unix socket ({MAX_SOCKET_PATH} characters at "
                "most): set TESSERA_TESTCLUSTER to a shorter folder"
            )
        return layout

    @property
    def binaries(self) -> Path:
        """One folder per module set and digest."""
        return self.root / "bin"

    @property
    def state(self) -> Path:
        """Everything that a start writes."""
        return self.root / "state"

    @property
    def certificates(self) -> Path:
        """The certificate authority and what it signed."""
        return self.state / "pki"

    @property
    def images(self) -> Path:
        """Image archives that are imported into containerd."""
        return self.state / "images"

    @property
    def manifests(self) -> Path:
        """Objects that are applied to the API server."""
        return self.state / "manifests"

    @property
    def kubeconfig(self) -> Path:
        """Opens the cluster as its administrator, from inside the network namespace."""
        return self.state / "admin.kubeconfig"

    @property
    def containerd_socket(self) -> Path:
        """Where containerd listens."""
        return self.state / "containerd" / "containerd.sock"
