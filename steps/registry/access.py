"""Connecting to the registry and turning a model URI into one model version and its files."""

from __future__ import annotations

import logging
import os
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import requests

from steps.job import StepError, redact
from steps.registry import managed
from steps.registry.credentials import load_credentials
from steps.registry.errors import error_code, explained
from steps.registry.remote import Store
from steps.registry.stores import open_store
from steps.registry.uris import ModelUri, check_unity_catalog_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("steps.registry")


@dataclass(frozen=True)
class Registry:
    """A connection to an MLflow registry.

    Attributes:
        client: the mlflow client.
        tracking_uri, registry_uri: without credentials, fit to be written down.
        credentials: their kind, see credentials.load_credentials.
    """

    client: MlflowClient
    tracking_uri: str
    registry_uri: str
    credentials: str

    @property
    def is_unity_catalog(self) -> bool:
        """Whether models have three-level names and their files need Unity Catalog's credentials."""
        return self.registry_uri.startswith("databricks-uc")

    def tag_key(self, key: str) -> str:
        """`key` as this registry takes it: Unity Catalog allows none of `. , - = / :` in a tag's key.

        Source: Databricks documentation, "Apply tags to Unity Catalog securable objects", Constraints.
        """
        return key.translate(str.maketrans(".,-=/:", "______")) if self.is_unity_catalog else key


@dataclass(frozen=True)
class ResolvedModel:
    """One model version (or logged model) and where its files are.

    Attributes:
        uri: what was asked for.
        name, version, alias, run_id, source: "" where the URI's form or the registry has none.
        store: its remote folder.
        tags: of the model version.
    """

    uri: ModelUri
    name: str
    version: str
    alias: str
    run_id: str
    source: str
    store: Store
    tags: dict[str, str] = field(default_factory=dict)


def connect() -> Registry:
    """Load the credentials and check that the registry answers.

    The URIs come from MLFLOW_TRACKING_URI and MLFLOW_REGISTRY_URI, as everywhere in MLflow.

    Raises:
        StepError: no URI, no answer, or credentials that cannot be read.
    """
    credentials = load_credentials()
    # mlflow's defaults (7 retries, doubling from 2 s) keep an expensive machine waiting for four minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT", "60")  # seconds
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not tracking:
        raise StepError(
            "MLFLOW_TRACKING_URI is not set in the job's environment.",
            "Set mlflow.tracking_uri in the configuration (databricks, or the server's URL).",
        )
    registry = os.environ.get("MLFLOW_REGISTRY_URI") or tracking
    _check_host(tracking)
    if registry != tracking:
        _check_host(registry)
    import mlflow

    if not managed.is_managed(tracking):
        managed.silence()
    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(registry)
    try:
        client = mlflow.MlflowClient(tracking_uri=tracking, registry_uri=registry)
    except Exception as error:  # mlflow's own opinion of the addresses: an unknown scheme, a file store
        raise StepError(
            f"mlflow takes no {redact(tracking)} with {redact(registry)}: {redact(str(error)):.300}.",
            "Correct mlflow.tracking_uri and mlflow.registry_uri.",
        ) from error
    return Registry(client, redact(tracking), redact(registry), credentials)


def resolve(registry: Registry, uri: ModelUri) -> ResolvedModel:
    """Look the model up and open its folder.

    Raises:
        StepError: it does not exist, or may not be read.
    """
    client, alias = registry.client, uri.alias or ""
    with explained(registry, f"ModelUri '{uri.text}'"):
        if uri.run_id:
            return _resolve_run(registry, uri)
        if uri.model_id:
            logged = client.get_logged_model(uri.model_id)
            store = open_store(_opener(registry, f"models:/{uri.model_id}"), "", "logged-model")
            return ResolvedModel(
                uri, logged.name, "", "", logged.source_run_id or "", logged.artifact_location, store
            )
        name = uri.name or ""
        if registry.is_unity_catalog:
            check_unity_catalog_name(name)
        elif alias and registry.registry_uri.partition("://")[0] == "databricks":
            raise StepError(
                f"ModelUri '{uri.text}' names an alias, and the workspace registry knows none.",
                "Set mlflow.registry_uri: databricks-uc (Unity Catalog), or name a version: models:/NAME/3.",
            )
        found = _by_alias(registry, uri) if alias else client.get_model_version(name, uri.version or "")
        if found.status not in ("READY", None):
            raise StepError(
                f"ModelUri '{uri.text}' is version {found.version}, whose status is {found.status}.",
                "Wait until it is READY, or register it again.",
            )
        version = str(found.version)
        store = open_store(_opener(registry, f"models:/{name}/{version}"), "", "")
        return ResolvedModel(
            uri, name, version, alias, found.run_id or "", found.source or "", store, dict(found.tags or {})
        )


def _by_alias(registry: Registry, uri: ModelUri) -> Any:
    from mlflow.exceptions import MlflowException

    name, alias = uri.name or "", uri.alias or ""
    try:
        return registry.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # "no such alias" is INVALID_PARAMETER_VALUE on a server and RESOURCE_DOES_NOT_EXIST in Unity Catalog
        if error_code(error)[0] not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            raise
    aliases = registry.client.get_registered_model(name).aliases  # raises when the model itself is missing
    known = ", ".join(f"{key} (version {value})" for key, value in sorted(aliases.items())) or "none"
    raise StepError(
        f"ModelUri '{uri.text}': model '{name}' has no alias '{alias}'; it has {known}.",
        f"Set it (set_registered_model_alias) in {registry.registry_uri}, or name a version.",
    )


def _resolve_run(registry: Registry, uri: ModelUri) -> ResolvedModel:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    run = registry.client.get_run(uri.run_id or "")
    path = uri.path or ""
    root = f"runs:/{uri.run_id}"
    repository: Any = get_artifact_repository(root)
    if any(entry.path == f"{path}/MLmodel" for entry in repository.repo.list_artifacts(path)):
        return ResolvedModel(
            uri,
            "",
            "",
            "",
            uri.run_id or "",
            run.info.artifact_uri,
            open_store(_opener(registry, root), path, "run"),
        )
    for model in _logged_models(registry, run.info.experiment_id, path):
        if model.source_run_id == uri.run_id and model.name == path:
            store = open_store(_opener(registry, f"models:/{model.model_id}"), "", "logged-model")
            return ResolvedModel(uri, "", "", "", uri.run_id or "", model.artifact_location, store)
    raise StepError(
        f"ModelUri '{uri.text}': run {uri.run_id} has no model at '{path}'.",
        "Look the run's models up in MLflow, or name a registered model (models:/NAME@ALIAS).",
    )


def _logged_models(registry: Registry, experiment: str, name: str) -> Iterator[Any]:
    """The experiment's logged models of this name: MLflow 3 keeps a model beside its run, not in it.

    Databricks cannot filter by run, so every page is looked through. A server before MLflow 3 has none.
    """
    from mlflow.exceptions import MlflowException

    token: str | None = None
    while True:
        try:
            page = registry.client.search_logged_models(
                [experiment], filter_string=f"name = '{name}'", page_token=token
            )
        except MlflowException as error:
            if error_code(error)[0] == "ENDPOINT_NOT_FOUND":
                return
            raise
        yield from page
        if not (token := page.token):
            return


def _opener(registry: Registry, uri: str) -> Callable[[], Any]:
    """Gives the repository that really holds the files of `uri`, with fresh credentials each time."""

    def make() -> Any:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with explained(registry, f"The files of '{uri}'"):
            repository = get_artifact_repository(uri)
            while True:  # models:/ -> Unity Catalog or a location -> possibly models:/m-… again
                if hasattr(repository, "_get_artifact_repo"):
                    repository = repository._get_artifact_repo()
                elif hasattr(repository, "repo"):
                    repository = repository.repo
                elif hasattr(repository, "databricks_sdk_repo"):
                    repository = _tracking_repository(repository)
                else:
                    return repository

    return make


def _tracking_repository(repository: Any) -> Any:
    """A Databricks run's artifacts come by the Files API, or, where that is refused, by signed URLs."""
    try:
        repository.databricks_sdk_repo.list_artifacts("")
        return repository.databricks_sdk_repo
    except Exception as error:  # whatever it is, mlflow's own repository falls back as well
        log.debug("no Files API for %s: %s", repository.artifact_uri, type(error).__name__)
        return repository.databricks_artifact_repo


def _check_host(uri: str) -> None:
    """One request, so that a wrong address fails in seconds and by its name."""
    if managed.is_managed(uri):
        return managed.prepare(uri)
    tls: dict[str, Any] = {}
    if uri.startswith("databricks"):
        url = os.environ.get("DATABRICKS_HOST", "")
        if not url and "://" not in uri:
            raise StepError(
                f"The registry is '{uri}', but DATABRICKS_HOST is not set.",
                "Set mlflow.databricks_host in the configuration (https://<workspace>.cloud.databricks.com).",
            )
        if not url:
            return  # a profile of ~/.databrickscfg names the host
    elif uri.startswith(("http://", "https://")):
        from mlflow.utils.credentials import get_default_host_creds

        creds = get_default_host_creds(uri)  # an own authority, a client certificate: MLFLOW_TRACKING_*
        url, tls = uri, {"verify": creds.verify, "cert": creds.client_cert_path}
    else:
        return  # a local store
    if "://" not in url:
        url = f"https://{url}"
    try:
        parts = urllib.parse.urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError as error:
        raise StepError(f"{redact(url)} is no URL: {error}.", "Correct mlflow.tracking_uri.") from None
    try:
        requests.get(url, timeout=(10, 30), allow_redirects=False, stream=True, **tls).close()
    except requests.RequestException as error:
        raise StepError(
            f"No answer from the MLflow registry at {parts.scheme}://{parts.hostname}{port} "
            f"({type(error).__name__}).",
            "Check the address and the job's network: VPC, security group, proxy, certificate.",
        ) from None
