"""Writes the addresses of the servers of models into a file that Prometheus watches.

    python -m infra.testcluster.discovery API_URL AUTHORITY CERTIFICATE KEY FILE

It stands in for the pod monitor of the chart, which needs Prometheus' operator: the same pods, port and labels.
"""

import json
import ssl
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SELECTOR = "app.kubernetes.io/component=serving"
PORT = 8000
PACE_S = 1.0


def targets(pods: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Prometheus reads of running pods, each with the labels that the monitor would add."""
    return [
        {
            "targets": [f"{pod['status']['podIP']}:{PORT}"],
            "labels": {
                "namespace": pod["metadata"]["namespace"],
                "pod": pod["metadata"]["name"],
                "rollouts_pod_template_hash": pod["metadata"]["labels"].get("rollouts-pod-template-hash", ""),
            },
        }
        for pod in pods
        if pod["status"].get("phase") == "Running" and pod["status"].get("podIP")
    ]


def main() -> None:
    """Ask the API server again and again, until a signal ends this."""
    url, authority, certificate, key, file = sys.argv[1:]
    context = ssl.create_default_context(cafile=authority)
    context.load_cert_chain(certificate, key)
    query = urllib.parse.urlencode({"labelSelector": SELECTOR})
    path, before = Path(file), ""
    while True:
        try:
            with urllib.request.urlopen(f"{url}/api/v1/pods?{query}", context=context, timeout=10) as answer:
                text = json.dumps(targets(json.load(answer)["items"]))
        except OSError as error:
            sys.stderr.write(f"{error}\n")
            text = before
        if text != before:
            fresh = path.with_suffix(".new")
            fresh.write_text(text)
            fresh.rename(path)
            before = text
        time.sleep(PACE_S)


if __name__ == "__main__":
    main()
