"""How the steps speak with an MLflow registry: names, credentials, download, inspection, provenance."""
