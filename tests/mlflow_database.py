"""An MLflow database without records: making one takes MLflow 5 s of processor time, and copying one nothing."""

import functools
import tempfile
from pathlib import Path


def new_database(path: Path) -> Path:
    """Write a database to a path, as MLflow makes it at the first use of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_empty_database())
    return path


@functools.cache
def _empty_database() -> bytes:
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        MlflowClient(uri, registry_uri=uri).search_experiments()
        return Path(folder, "mlflow.db").read_bytes()
