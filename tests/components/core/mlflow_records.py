"""All that an MLflow database holds of an experiment, in a form in which two databases can be compared."""

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

OWN = ("tessera.dev/store", "tessera.dev/identity", "mlflow.parentRunId", "mlflow.user", "mlflow.modelVersions")
"""Tags that differ between two stores or databases; the last one is only written through a server."""


def mlflow_records(database: Path, experiment: str, registered_model: str = "tessera") -> dict[str, Any]:
    """Runs, metrics, models and versions by name; what is there twice shows twice."""
    uri = f"sqlite:///{database}"
    client = MlflowClient(uri, registry_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = [client.get_run(run.info.run_id) for run in client.search_runs([found.experiment_id], max_results=1000)]
    names = {run.info.run_id: run.info.run_name for run in runs}
    models = client.search_logged_models([found.experiment_id])
    of_model = {model.model_id: model.tags["tessera.dev/digest"] for model in models}
    versions = client.search_model_versions(f"name = '{registered_model}'")
    return {
        "runs": sorted((_run(run, names, of_model) for run in runs), key=lambda run: (run["below"], run["name"])),
        "metrics": _metrics(database, found.experiment_id),
        "models": sorted(
            (
                {"name": model.name, "status": str(model.status), "params": model.params, "tags": _common(model.tags)}
                | {"run": names.get(model.source_run_id or ""), "metrics": _measured(model)}
                for model in models
            ),
            key=lambda model: (model["name"], model["tags"]["tessera.dev/digest"]),
        ),
        "versions": [
            {"version": version.version, "tags": _common(version.tags), "aliases": sorted(_aliases(client, version))}
            for version in sorted(versions, key=lambda version: int(version.version))
        ],
    }


def _run(run: Any, names: dict[str, str], of_model: dict[str, str]) -> dict[str, Any]:
    inputs, outputs = run.inputs, run.outputs
    data = [(one.dataset.name, one.dataset.digest, one.dataset.profile) for one in inputs.dataset_inputs]
    return {
        "name": run.info.run_name,
        "below": names.get(run.data.tags.get("mlflow.parentRunId"), ""),
        "status": run.info.status,
        "times": (run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "tags": _common(run.data.tags),
        "data": sorted(data),
        "read": sorted(of_model[one.model_id] for one in inputs.model_inputs),
        "made": sorted(of_model[one.model_id] for one in (outputs.model_outputs if outputs else [])),
    }


def _metrics(database: Path, experiment_id: str) -> list[Any]:
    """Every point of every curve of every run."""
    query = (
        "SELECT r.name, p.value, m.key, m.step, m.timestamp, m.value FROM metrics m "
        "JOIN runs r ON r.run_uuid = m.run_uuid JOIN tags p ON p.run_uuid = r.run_uuid AND p.key = 'tessera.dev/run' "
        "WHERE r.experiment_id = ? AND r.lifecycle_stage = 'active'"
    )
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return sorted(connection.execute(query, [experiment_id]).fetchall())


def _measured(model: Any) -> list[Any]:
    return sorted((metric.key, metric.step, metric.value, metric.dataset_digest) for metric in model.metrics or [])


def _common(tags: dict[str, str]) -> dict[str, str]:
    """Tags that do not differ between stores: addresses are cut down to their digest."""
    return {name: value.rpartition("#")[2] for name, value in tags.items() if name not in OWN}


def _aliases(client: MlflowClient, version: Any) -> list[str]:
    return list(client.get_model_version(version.name, version.version).aliases)
