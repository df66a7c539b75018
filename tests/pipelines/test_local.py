"""The MLflow server of a local run, whatever the caller's shell holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from pipelines.local import MlflowServer


def test_the_servers_registry_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")  # nobody listens there
    server = MlflowServer(tmp_path / "mlflow")
    try:
        server.wait_until_healthy()
        models = f"{server.uri}/api/2.0/mlflow/registered-models"
        created = requests.post(f"{models}/create", json={"name": "mine"}, timeout=60)
        assert created.status_code == 200, created.text
        assert not server.has_alias("mine", "champion")
    finally:
        server.stop()
