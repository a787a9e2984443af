"""A Kubeflow Pipelines server: pipelines by the digest of what they run, runs by name, and how a run goes on."""

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.base.errors import ClusterError
from components.core.base.kubernetes_api import load_cluster

ACTIVE = ("RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "CANCELING", "PAUSED")
EQUALS = 1
"""Number of KFP's filter operation; its names are not taken in JSON."""


@dataclass(frozen=True)
class KfpRun:
    """A run on the server: its id, KFP's state, and the first error of a task that has one."""

    id: str
    state: str
    error: str = ""

    @property
    def is_active(self) -> bool:
        """Whether the run has not ended."""
        return self.state in ACTIVE


class KfpServer:
    """The calls that `tessera submit` makes.

    Args:
        url: address of the API; None takes the service of the cluster that kubeconfig, or the pod, names.
        namespace: of the runs.
        service_account: of their pods; None for that of Kubeflow Pipelines, which may read every secret.

    Attributes:
        url: address of the API.
        namespace: of the runs; None on a server without tenants, which has all runs in its own.

    Raises:
        ClusterError: there is no address, or nothing answers there.
    """

    def __init__(self, url: str | None, namespace: str, service_account: str | None = None) -> None:
        from kfp import Client

        self.url, self._service_account = url or load_cluster(), service_account
        with self._errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self._client: Client = Client(host=url)
            # A server without tenants refuses requests with a namespace.
            self.namespace = namespace if self._client.get_kfp_healthz().multi_user else None

    def find_run(self, name: str) -> KfpRun | None:
        """The newest run of a name, None where there is none."""
        with self._errors():
            found = self._client.list_runs(
                page_size=1, sort_by="created_at desc", namespace=self.namespace, filter=_named(name)
            )
        return self.run(found.runs[0].run_id) if found.runs else None

    def run(self, run_id: str) -> KfpRun:
        """The present state of a run."""
        with self._errors():
            found = self._client.get_run(run_id)
        tasks = (found.run_details.task_details if found.run_details else None) or []
        errors = [error.message for error in (*(task.error for task in tasks), found.error) if error and error.message]
        # KFP fails the Workflow of a run that it ends, and then reports that the run failed.
        was_cancelled = any(status.state == "CANCELING" for status in found.state_history or [])
        state = "CANCELED" if found.state == "FAILED" and was_cancelled else found.state or ACTIVE[0]
        return KfpRun(found.run_id, state, errors[0] if errors else "")

    def upload(self, file: Path, pipeline: str, version: str, description: str) -> tuple[str, str]:
        """Upload a compiled pipeline as a version, unless the version is there; returns the ids of both."""
        from kfp_server_api import V2beta1Pipeline

        with self._errors():
            pipeline_id = self._pipeline_id(pipeline)
            if pipeline_id is None:  # `upload_pipeline` would also make a version, by the name of the pipeline
                created = V2beta1Pipeline(display_name=pipeline, name=pipeline, namespace=self.namespace)
                pipeline_id = self._client.pipelines.pipeline_service_create_pipeline(created).pipeline_id
            versions = self._client.list_pipeline_versions(pipeline_id, page_size=1, filter=_named(version))
            if versions.pipeline_versions:
                return pipeline_id, versions.pipeline_versions[0].pipeline_version_id
            added = self._client.upload_pipeline_version(
                str(file), version, pipeline_id=pipeline_id, description=description
            )
            return pipeline_id, added.pipeline_version_id

    def start(self, name: str, experiment: str, pipeline: tuple[str, str], parameters: dict[str, str]) -> KfpRun:
        """Start a run of a version of a pipeline."""
        pipeline_id, version_id = pipeline
        with self._errors():
            where = self._client.create_experiment(experiment, namespace=self.namespace)
            started = self._client.run_pipeline(
                where.experiment_id,
                name,
                params=parameters,
                pipeline_id=pipeline_id,
                version_id=version_id,
                service_account=self._service_account,
            )
        return KfpRun(started.run_id, started.state or ACTIVE[0])

    def terminate(self, run_id: str) -> None:
        """End a run that is active."""
        with self._errors():
            self._client.terminate_run(run_id)

    def page(self, run_id: str) -> str:
        """Address of a run in the web interface."""
        return f"{self.url}/#/runs/details/{run_id}"

    def _pipeline_id(self, name: str) -> str | None:
        found = self._client.list_pipelines(page_size=1, namespace=self.namespace, filter=_named(name))
        return str(found.pipelines[0].pipeline_id) if found.pipelines else None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the client in the block into one of ours, and keep what it prints from the user.

        Raises:
            ClusterError: the server does not answer, or refuses.
        """
        from kfp_server_api.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        except ApiException as error:
            raise _refusal(self.url, error) from error
        except (HTTPError, OSError) as error:
            raise ClusterError(
                f"Kubeflow Pipelines does not answer at {self.url}: {_reason(error)}",
                hint="give its address with --kfp URL, e.g. http://127.0.0.1:8888 of a `kubectl port-forward`",
            ) from error


def _named(name: str) -> str:
    """KFP's filter for one display name."""
    return json.dumps({"predicates": [{"operation": EQUALS, "key": "display_name", "stringValue": name}]})


def _refusal(url: str, error: Any) -> ClusterError:
    """The error behind an answer with an error status."""
    try:
        body = json.loads(error.body)
        reason = body.get("message") or body.get("error")
    except (ValueError, TypeError, AttributeError):
        reason = error.reason
    if error.status in (401, 403):
        hint = "log in, or ask for the role kubeflow-edit in the namespace; `tessera cluster check` lists the rights"
        return ClusterError(f"Kubeflow Pipelines at {url} refuses you: {reason}", hint=hint)
    return ClusterError(f"Kubeflow Pipelines at {url} answered {error.status}: {reason}")


def _reason(error: Exception) -> str:
    """The innermost reason of an error of urllib3, in one line."""
    inner = getattr(error, "reason", None) or error
    return str(inner).splitlines()[0] if str(inner) else type(error).__name__
