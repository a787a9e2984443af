"""Kubernetes on one machine: `python -m infra.testcluster build|missing|up|down|status|exec`; `--help` says more."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from infra.testcluster import build as builds
from infra.testcluster import images, node, pki
from infra.testcluster.controllers import CONTROLLERS, controller_services
from infra.testcluster.gateway import gateway_services
from infra.testcluster.layout import Layout, TestClusterError
from infra.testcluster.manifests import write_manifests
from infra.testcluster.network import inside_namespace, make_namespace, remove_namespace, run_inside, set_up_addresses
from infra.testcluster.runner import Runner, raise_file_limit, say
from infra.testcluster.services import Service, core_services
from infra.testcluster.wheels import WHEELS, install

DEBIAN_PACKAGES = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "sysctl": "procps",
    "runc": "runc",
    "iptables": "iptables",
    "prometheus": "prometheus",
}
"""Programs that are taken from the system, each with its Debian package."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Without = Annotated[
    list[str] | None,
    typer.Option(
        help="A module set to leave out, with its services: trainer, argo, ctrl, rollouts, flux, traefik, prometheus."
    ),
]


@app.command()
def build(without: Without = None) -> None:
    """Build the programs that are not in the cache."""
    layout = Layout.from_environment()
    absent = [modules for modules in builds.missing(layout) if modules.name not in (without or [])]
    if absent:
        builds.check_go()
    for modules in absent:
        say(f"building {modules.name}")
        say(f"built {modules.name} in {builds.build(modules, layout):.0f} s")
    for wheel in WHEELS:
        if wheel.name not in (without or []) and not wheel.folder(layout).is_dir():
            say(f"installed {wheel.name} in {install(wheel, layout):.0f} s")


@app.command()
def missing() -> None:
    """Name the module sets that are not in the cache; fails where there is one."""
    absent = builds.missing(Layout.from_environment())
    for modules in absent:
        say(modules.name)
    raise typer.Exit(1 if absent else 0)


@app.command()
def up(without: Without = None) -> None:
    """Start the cluster; what runs already is left alone."""
    started = time.monotonic()
    layout = Layout.from_environment()
    if not inside_namespace():
        _check_host()
        build(without)
        make_namespace()
        _again_inside()
    raise_file_limit()
    set_up_addresses()
    pki.make_certificates(layout)
    left_out = without or []
    write_manifests([found for found in CONTROLLERS if found.modules not in left_out], layout)
    for archive, image in _images(layout, left_out).items():
        if not archive.exists():
            images.write_image(image, archive)
    runner = _runner(layout)
    for service in _services(layout, left_out):
        before = time.monotonic()
        runner.start(service)
        say(f"{service.name} is ready ({time.monotonic() - before:.1f} s)")
    say(f"the cluster is up after {time.monotonic() - started:.0f} s; KUBECONFIG={layout.kubeconfig}")


@app.command()
def down(wipe: Annotated[bool, typer.Option(help="Also remove the cluster's state.")] = False) -> None:
    """Stop the cluster; its state stays for the next start."""
    layout = Layout.from_environment()
    _check_host()
    if layout.certificates.exists():
        if not inside_namespace():
            make_namespace()
            _again_inside()
        runner, services = _runner(layout), _services(layout, [])
        for service in reversed(services):
            if service.name == "containerd" and runner.process(service) is not None:
                node.end_containers(runner, layout)
            runner.stop(service)
        node.release_mounts(layout)
        node.remove_control_groups()
    if wipe:
        remove_namespace()
        shutil.rmtree(layout.state, ignore_errors=True)
    say("the cluster is down")


@app.command()
def status() -> None:
    """Show which services run and how much memory they take."""
    layout = Layout.from_environment()
    absent = [modules.name for modules in builds.missing(layout)]
    absent += [wheel.name for wheel in WHEELS if not wheel.folder(layout).is_dir()]
    say(f"not built: {', '.join(absent) or 'nothing'}")
    if not layout.certificates.exists():
        raise typer.Exit(1)
    runner, total, down = _runner(layout), 0, 0
    for service in _services(layout, absent):
        process = runner.process(service)
        memory = 0 if process is None else process.memory_info().rss // 2**20
        total, down = total + memory, down + (process is None)
        say(f"{service.name:24} {'down' if process is None else f'{memory:5} MiB'}")
    say(f"{'total':24} {total:5} MiB")
    raise typer.Exit(1 if down else 0)


@app.command(name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def execute(command: Annotated[list[str], typer.Argument(help="A program and its arguments.")]) -> None:
    """Run a command inside the cluster's network namespace, with its kubeconfig and programs."""
    layout = Layout.from_environment()
    if not layout.kubeconfig.exists():
        raise TestClusterError("there is no cluster: start one with `make cluster-up`")
    folders = [str(each.folder(layout)) for each in (*builds.MODULE_SETS, *WHEELS)]
    os.environ["PATH"] = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    os.environ["KUBECONFIG"] = str(layout.kubeconfig)
    os.environ["TESSERA_TESTCLUSTER"] = str(layout.root)
    run_inside(command)


def _services(layout: Layout, without: list[str]) -> list[Service]:
    core = core_services(layout, list(_images(layout, without)))
    services = [*core, *controller_services(layout), *gateway_services(layout)]
    return [service for service in services if service.modules not in without]


def _images(layout: Layout, without: list[str]) -> dict[Path, images.Image]:
    """The images that the node needs, by their archives; an archive belongs to one build."""
    programs = {"pause": (images.PAUSE, "pause"), "argo": (images.ARGO_EXECUTOR, "argoexec")}
    wanted = {layout.images / "host.tar": images.host_image()}
    for name, (tag, program) in programs.items():
        folder = builds.module_set(name).folder(layout)
        if name not in without:
            wanted[layout.images / f"{folder.name}.tar"] = images.program_image(tag, folder / program)
    return wanted


def _runner(layout: Layout) -> Runner:
    """The programs of older builds come last: they can still stop what they started."""
    current = [each.folder(layout) for each in (*builds.MODULE_SETS, *WHEELS)]
    return Runner(layout, dict.fromkeys([*current, *layout.binaries.glob("*-*")]))


def _check_host() -> None:
    """Raise where this machine lacks what a node needs."""
    if os.geteuid() != 0:
        raise TestClusterError("the test cluster makes network namespaces, mounts and control groups: run it as root")
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    lacking = sorted(
        {package for program, package in DEBIAN_PACKAGES.items() if shutil.which(program, path=path) is None}
    )
    if lacking:
        raise TestClusterError(f"Debian packages are missing: apt-get install {' '.join(lacking)}")


def _again_inside() -> None:
    run_inside([sys.executable, "-m", "infra.testcluster", *sys.argv[1:]])


def main() -> None:
    """Run one command; what the user has to mend is said in one message."""
    try:
        app()
    except TestClusterError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
