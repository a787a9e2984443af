"""The parts of a control plane and a node as data: programs, configuration files, signs of readiness."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from infra.testcluster.build import module_set
from infra.testcluster.images import PAUSE
from infra.testcluster.layout import (
    BRIDGE,
    DNS_DOMAIN,
    GATEWAY,
    NODE,
    POD_NETWORK,
    POOL_LABEL,
    SERVICE_NETWORK,
    Layout,
)

Command = tuple[str, ...]
ETCD_URL = "http://127.0.0.1:2379"
REAL_POOL = "cpu"
REAL_GPUS = 8
"""GPUs that the real node claims to have; nothing is mounted into a pod that asks for one."""
RUNC = "/usr/sbin/runc"
CRI_READY = Path(__file__).with_name("cri_ready.py")


class Service(BaseModel):
    """One process. It is started after the ones before it in the list are ready."""

    model_config = ConfigDict(frozen=True)

    name: str
    modules: str
    """The module set that the program is built from, see `build.MODULE_SETS`."""
    command: Command
    environment: dict[str, str] = {}
    files: dict[Path, str] = {}
    """Configuration files, written before each start and before the commands of `before`."""
    links: dict[Path, Path] = {}
    """Links outside the state folder, for programs with a fixed path; they are removed when the process is stopped."""
    before: tuple[Command, ...] = ()
    """Commands that have to succeed before the process is started; each is repeated until it does."""
    ready_url: str = ""
    """An address that answers with 200 when the process is ready."""
    after: tuple[Command, ...] = ()
    """Commands that have to succeed before the service counts as ready, also where it runs already."""
    patience_s: float = 90
    """How long readiness, and each command, is waited for."""
    grace_period_s: float = 5
    """Seconds between SIGTERM and SIGKILL."""


def apply_file(path: Path) -> Command:
    """A command that writes a file's objects to the API server."""
    return ("kubectl", "apply", "--server-side", "--force-conflicts", "--filename", str(path))


def core_services(layout: Layout, archives: list[Path]) -> list[Service]:
    """The control plane, one real node that has the given images, DNS and cluster addresses."""
    return [
        _etcd(layout),
        _api_server(layout),
        _controller_manager(layout),
        _scheduler(layout),
        _containerd(layout, archives),
        _kubelet(layout),
        _coredns(layout),
        _proxy(layout),
    ]


def _etcd(layout: Layout) -> Service:
    options = {
        "name": "default",
        "data-dir": layout.state / "etcd",
        "listen-client-urls": ETCD_URL,
        "advertise-client-urls": ETCD_URL,
        "listen-peer-urls": "http://127.0.0.1:2380",
        "initial-advertise-peer-urls": "http://127.0.0.1:2380",
        "initial-cluster": "default=http://127.0.0.1:2380",
        "unsafe-no-fsync": "true",
    }
    return Service(name="etcd", modules="etcd", command=_command("etcd", options), ready_url=f"{ETCD_URL}/health")


def _api_server(layout: Layout) -> Service:
    keys = layout.certificates
    options = {
        "etcd-servers": ETCD_URL,
        "bind-address": "0.0.0.0",
        "secure-port": 443,
        "advertise-address": GATEWAY,
        "service-cluster-ip-range": SERVICE_NETWORK,
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "allow-privileged": "true",
        "client-ca-file": keys / "ca.crt",
        "tls-cert-file": keys / "apiserver.crt",
        "tls-private-key-file": keys / "apiserver.key",
        "kubelet-certificate-authority": keys / "ca.crt",
        "kubelet-client-certificate": keys / "kubelet-client.crt",
        "kubelet-client-key": keys / "kubelet-client.key",
        "kubelet-preferred-address-types": "InternalIP,Hostname",
        "service-account-issuer": f"https://kubernetes.default.svc.{DNS_DOMAIN}",
        "service-account-key-file": keys / "tokens.pub",
        "service-account-signing-key-file": keys / "tokens.key",
        "requestheader-client-ca-file": keys / "ca.crt",
        "requestheader-allowed-names": "front-proxy-client",
        "requestheader-username-headers": "X-Remote-User",
        "requestheader-group-headers": "X-Remote-Group",
        "requestheader-extra-headers-prefix": "X-Remote-Extra-",
        "proxy-client-cert-file": keys / "front-proxy.crt",
        "proxy-client-key-file": keys / "front-proxy.key",
    }
    return Service(
        name="kube-apiserver",
        modules="kube",
        command=_command("kube-apiserver", options),
        after=(("kubectl", "get", "--raw", "/readyz"), ("kubectl", "get", "namespace", "default")),
    )


def _controller_manager(layout: Layout) -> Service:
    keys = layout.certificates
    options = {
        **_component(layout, "controller-manager"),
        "use-service-account-credentials": "true",
        "service-account-private-key-file": keys / "tokens.key",
        "root-ca-file": keys / "ca.crt",
        "client-ca-file": keys / "ca.crt",
        "requestheader-client-ca-file": keys / "ca.crt",
        "cluster-signing-cert-file": keys / "ca.crt",
        "cluster-signing-key-file": keys / "ca.key",
    }
    return Service(name="kube-controller-manager", modules="kube", command=_command("kube-controller-manager", options))


def _scheduler(layout: Layout) -> Service:
    return Service(
        name="kube-scheduler", modules="kube", command=_command("kube-scheduler", _component(layout, "scheduler"))
    )


def _containerd(layout: Layout, archives: list[Path]) -> Service:
    settings, socket = layout.state / "containerd.toml", layout.containerd_socket
    runtime = "plugins.'io.containerd.cri.v1.runtime'"
    # Without restrict_oom_score_adj every pod asks for a score that only CAP_SYS_RESOURCE allows.
    text = f"""
version = 3
root = "{layout.state}/containerd/root"
state = "{layout.state}/containerd/run"
oom_score = 0
[grpc]
address = "{socket}"
[plugins.'io.containerd.nri.v1.nri']
disable = true
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{PAUSE}"
[{runtime}]
restrict_oom_score_adj = true
disable_apparmor = true
disable_hugetlb_controller = true
tolerate_missing_hugetlb_controller = true
[{runtime}.containerd]
default_runtime_name = "runc"
[{runtime}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[{runtime}.containerd.runtimes.runc.options]
BinaryName = "{RUNC}"
SystemdCgroup = false
[{runtime}.cni]
bin_dirs = ["{module_set("cri").folder(layout)}"]
conf_dir = "{layout.state}/cni/conf"
"""
    addresses = {"subnet": POD_NETWORK, "rangeStart": "10.88.1.0", "rangeEnd": "10.88.9.255", "gateway": GATEWAY}
    ipam = {"type": "host-local", "dataDir": f"{layout.state}/cni/addresses", "ranges": [[addresses]]}
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "isDefaultGateway": True, "hairpinMode": True}
    network = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{**bridge, "ipam": ipam}]}
    return Service(
        name="containerd",
        modules="cri",
        command=("containerd", "--config", str(settings)),
        files={settings: text, layout.state / "cni/conf/10-pods.conflist": json.dumps(network)},
        after=(
            *(
                ("ctr", "--address", str(socket), "--namespace", "k8s.io", "images", "import", str(archive))
                for archive in archives
            ),
            (sys.executable, str(CRI_READY), str(socket)),
        ),
    )


def _kubelet(layout: Layout) -> Service:
    keys, settings, resolver = layout.certificates, layout.state / "kubelet.yaml", layout.state / "resolv.conf"
    tight = dict.fromkeys(("nodefs.available", "nodefs.inodesFree", "imagefs.available", "imagefs.inodesFree"), "1%")
    configuration = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "containerRuntimeEndpoint": f"unix://{layout.containerd_socket}",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(keys / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(keys / "node.crt"),
        "tlsPrivateKeyFile": str(keys / "node.key"),
        "clusterDNS": [GATEWAY],
        "clusterDomain": DNS_DOMAIN,
        "resolvConf": str(resolver),
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "maxOpenFiles": 20000,
        "evictionHard": {"memory.available": "200Mi", **tight},
        # No registry could give an image again, so none is ever removed.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "imageMinimumGCAge": "1000h",
        "serializeImagePulls": False,
        "volumePluginDir": str(layout.state / "kubelet/plugins"),
    }
    options = {
        "config": settings,
        "kubeconfig": layout.state / "node.kubeconfig",
        "root-dir": layout.state / "kubelet",
        "cert-dir": layout.state / "kubelet/pki",
        "hostname-override": NODE,
        "node-ip": GATEWAY,
        "node-labels": f"{POOL_LABEL}={REAL_POOL}",
    }
    gpus = {"nvidia.com/gpu": str(REAL_GPUS)}
    status = json.dumps({"status": {"capacity": gpus, "allocatable": gpus}})
    return Service(
        name="kubelet",
        modules="kube",
        command=_command("kubelet", options),
        files={settings: yaml.safe_dump(configuration), resolver: f"nameserver {GATEWAY}\n"},
        # A node left from the last start would still say that it is ready.
        before=(("kubectl", "delete", "node", NODE, "--ignore-not-found"),),
        ready_url="http://127.0.0.1:10248/healthz",
        after=(
            ("kubectl", "wait", "--for=condition=Ready", f"node/{NODE}", "--timeout=5s"),
            ("kubectl", "patch", "node", NODE, "--subresource=status", "--type=merge", f"--patch={status}"),
        ),
    )


def _coredns(layout: Layout) -> Service:
    settings, reverse = layout.state / "Corefile", "88.10.in-addr.arpa 96.10.in-addr.arpa"
    text = f"""
{DNS_DOMAIN} {reverse} {{
    bind {GATEWAY}
    errors
    ready 127.0.0.1:8181
    kubernetes {DNS_DOMAIN} {reverse} {{
        kubeconfig {layout.kubeconfig} testcluster
        pods insecure
        ttl 1
    }}
    cache 2
}}
. {{
    bind {GATEWAY}
    errors
    template ANY ANY . {{
        rcode NXDOMAIN
    }}
}}
"""
    return Service(
        name="coredns",
        modules="coredns",
        command=("coredns", "-conf", str(settings)),
        files={settings: text},
        ready_url="http://127.0.0.1:8181/ready",
    )


def _proxy(layout: Layout) -> Service:
    options = {
        "kubeconfig": layout.state / "proxy.kubeconfig",
        "proxy-mode": "iptables",
        "cluster-cidr": POD_NETWORK,
        "hostname-override": NODE,
        "conntrack-max-per-core": 0,
        "metrics-bind-address": "127.0.0.1:10249",
        "healthz-bind-address": "127.0.0.1:10256",
    }
    return Service(
        name="kube-proxy",
        modules="kube",
        command=_command("kube-proxy", options),
        ready_url="http://127.0.0.1:10256/healthz",
    )


def _component(layout: Layout, name: str) -> dict[str, Any]:
    """Options that the controller manager and the scheduler have in common."""
    kubeconfig = layout.state / f"{name}.kubeconfig"
    return {
        "kubeconfig": kubeconfig,
        "authentication-kubeconfig": kubeconfig,
        "authorization-kubeconfig": kubeconfig,
        "bind-address": "127.0.0.1",
        "leader-elect": "false",
    }


def _command(program: str, options: dict[str, Any]) -> Command:
    return (program, *(f"--{name}={value}" for name, value in options.items()))
