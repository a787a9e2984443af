"""The chart `helm/tessera` without a helm binary: what an install would apply, what Helm's linter says, an install.

python -m infra.chart render [--values FILE]
python -m infra.chart lint [--values FILE]
python -m infra.chart upgrade --namespace NAME [--values FILE]
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parent.parent / "helm" / "tessera"
KUBERNETES = "v1.34.0"
"""The oldest Kubernetes that the chart is for; lint reports an API that is deprecated there."""


def render(
    values: Mapping[str, Any] | None = None,
    *,
    chart: Path = CHART,
    release: str = "tessera",
    namespace: str = "tessera",
    is_upgrade: bool = False,
) -> list[dict[str, Any]]:
    """The objects that an install or an upgrade would apply, a namespace before what is in it.

    Raises:
        helm_python.HelmError: the schema or a template refuses the values; the message names the key.
    """
    with helm_python.Chart.load(chart) as loaded:
        texts = loaded.render(
            dict(values or {}), name=release, namespace=namespace, is_install=not is_upgrade, is_upgrade=is_upgrade
        )
    manifests = [text for path, text in sorted(texts.items()) if path.endswith(".yaml")]
    objects = [made for text in manifests for made in yaml.safe_load_all(text) if made is not None]
    return sorted(objects, key=lambda made: made["kind"] != "Namespace")


def lint(values: Mapping[str, Any] | None = None, *, chart: Path = CHART) -> list[str]:
    """What Helm's linter reports as warning or error; empty for a good chart."""
    report = helm_python.lint(chart, dict(values or {}), strict=True, kube_version=KUBERNETES)
    return [f"{found['path']}: {found['error']}" for found in report["messages"] if found["severity"] > 1]


def upgrade(values: Mapping[str, Any], namespace: str, *, chart: Path = CHART, release: str = "tessera") -> None:
    """Install the chart in the cluster that the kubeconfig names, or upgrade it, as `helm upgrade --install` does.

    Raises:
        helm_python.HelmError: the values or the cluster refuse.
    """
    with helm_python.Config(namespace=namespace) as helm:
        try:
            helm.upgrade(chart, release, dict(values), namespace=namespace)
        except helm_python.HelmNotFoundError:
            helm.install(chart, release, dict(values), namespace=namespace)


def main() -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.chart", description="Render, lint or install the chart.")
    parser.add_argument("command", choices=("render", "lint", "upgrade"))
    parser.add_argument("--values", type=Path, metavar="FILE", help="YAML with values of your own")
    parser.add_argument(
        "--namespace", metavar="NAME", help="namespace of the release, which must be there: for upgrade"
    )
    options = parser.parse_args()
    try:
        values = yaml.safe_load(options.values.read_text(encoding="utf-8")) if options.values else {}
        findings = lint(values) if options.command == "lint" else []
        if options.command == "upgrade":
            upgrade(values, options.namespace or parser.error("upgrade needs --namespace"))
        if options.command == "render":
            yaml.safe_dump_all(render(values), sys.stdout, sort_keys=False)
    except (OSError, yaml.YAMLError, helm_python.HelmError) as error:
        findings = [str(error)]
    sys.stderr.writelines(f"{finding.strip()}\n" for finding in findings)
    return 2 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
