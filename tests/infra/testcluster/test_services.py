import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from infra.testcluster.build import MODULE_SETS, module_set
from infra.testcluster.controllers import controller_services
from infra.testcluster.discovery import PORT, targets
from infra.testcluster.gateway import gateway_services
from infra.testcluster.layout import Layout, TestClusterError
from infra.testcluster.pki import make_certificates
from infra.testcluster.services import Service, core_services
from infra.testcluster.wheels import WHEELS


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = Layout(tmp_path_factory.mktemp("cluster"))
    make_certificates(layout)
    return layout


@pytest.fixture(scope="module")
def services(layout: Layout) -> list[Service]:
    core = core_services(layout, [Path("/images/host.tar")])
    return [*core, *controller_services(layout), *gateway_services(layout)]


def programs(name: str) -> Iterator[str]:
    """The programs that a module set builds, that a wheel has, or that are installed."""
    if name in {wheel.name for wheel in WHEELS}:
        yield name
        return
    if name == "prometheus":
        yield from ("prometheus", sys.executable)
        return
    modules = module_set(name)
    if modules.packages == ".":
        yield name
    for path in _tools((modules.source / "go.mod").read_text()).split():
        program = re.sub(r"/v\d+$", "", path).split("/")[-1]
        yield modules.renamed.get(program, program)


def _tools(text: str) -> str:
    block = re.search(r"^tool \(\n(.*?)^\)", text, re.M | re.S)
    return block[1] if block else "\n".join(re.findall(r"^tool (\S+)$", text, re.M))


def test_every_service_has_its_own_name_and_a_program_that_its_module_set_builds(services: list[Service]) -> None:
    assert len({service.name for service in services}) == len(services)
    for service in services:
        assert service.command[0] in set(programs(service.modules)), service.name


def test_every_module_set_is_needed(services: list[Service]) -> None:
    unused = {modules.name for modules in MODULE_SETS} - {service.modules for service in services}
    assert unused == {"pause", "gateway"}  # an image, and the kinds of Traefik's gateway


def test_files_lie_in_the_state_folder_and_parse(services: list[Service], layout: Layout) -> None:
    for service in services:
        for path, text in service.files.items():
            assert path.is_relative_to(layout.state)
            if path.suffix == ".toml":
                assert tomllib.loads(text)["version"] == 3
            elif path.suffix in {".yaml", ".conflist"}:
                assert list(yaml.safe_load_all(text))


def test_services_listen_on_different_health_ports(services: list[Service]) -> None:
    addresses = [service.ready_url.split("/")[2] for service in services if service.ready_url]
    assert len(set(addresses)) == len(addresses)


def test_a_folder_whose_sockets_have_too_long_a_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_TESTCLUSTER", "/tmp/" + "long/" * 20)
    with pytest.raises(TestClusterError, match="shorter folder"):
        Layout.from_environment()


def test_prometheus_reads_running_pods_under_the_labels_of_the_monitor() -> None:
    labels = {"rollouts-pod-template-hash": "abc"}
    metadata = {"namespace": "models", "name": "nano-1", "labels": labels}
    running = {"metadata": metadata, "status": {"phase": "Running", "podIP": "10.88.1.2"}}
    waiting = {"metadata": metadata, "status": {"phase": "Pending"}}
    assert targets([running, waiting]) == [
        {
            "targets": [f"10.88.1.2:{PORT}"],
            "labels": {"namespace": "models", "pod": "nano-1", "rollouts_pod_template_hash": "abc"},
        }
    ]
