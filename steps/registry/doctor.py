"""Check up front that PullModel and RecordRelease will be able to work, and say exactly what is missing.

    python -m steps.registry.doctor MODEL_URI [--json]

Unity Catalog's rules: reading a model needs USE CATALOG and USE SCHEMA on its parents and EXECUTE on it;
writing tags needs APPLY TAG on it; an alias is set by the model's owner, who holds every privilege on it
(Databricks documentation, "Manage model lifecycle in Unity Catalog", "Apply tags to Unity Catalog securable
objects", "Manage Unity Catalog object ownership"; REST API, "Set Registered Model Alias").
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from steps.job import StepError, redact
from steps.registry.access import Registry, ResolvedModel, connect, resolve
from steps.registry.errors import explained
from steps.registry.paths import check_paths
from steps.registry.remote import ExpiredError, Store, TransferError
from steps.registry.uris import ModelUri, check_unity_catalog_name, parse_model_uri

# what a privilege is for, and the kind of securable (as the grants API calls it) that it is held on
_READ = (("catalog", "USE_CATALOG"), ("schema", "USE_SCHEMA"), ("function", "EXECUTE"))
_WRITE = (("function", "APPLY_TAG"),)
_ALL = "ALL_PRIVILEGES"


@dataclass(frozen=True)
class Check:
    """One answer. `state`: ok, failed, or unknown (it could not be asked); `fix` is "" when ok."""

    name: str
    state: str
    detail: str
    fix: str = ""


def diagnose(uri_text: str) -> list[Check]:
    """Run the checks in order; those that a failed one makes pointless are left out."""
    return list(_checks(uri_text))


def _checks(uri_text: str) -> Iterator[Check]:
    try:
        uri = parse_model_uri(uri_text)
        yield Check("model URI", "ok", uri_text)
        registry = connect()
    except StepError as error:
        yield Check("registry", "failed", error.what, error.fix)
        return
    yield Check("credentials", "ok", registry.credentials)
    yield Check("registry", "ok", f"{registry.registry_uri} answers")
    catalog = registry.is_unity_catalog and uri.name
    try:
        if catalog:
            check_unity_catalog_name(uri.name or "")
    except StepError as error:
        yield Check("model", "failed", error.what, error.fix)
        return
    try:
        model = resolve(registry, uri)
        yield Check("model", "ok", f"version {model.version or '-'}, run {model.run_id or '-'}")
        yield _readable(registry, model)
    except StepError as error:
        yield Check("model", "failed", error.what, error.fix)
        if catalog:
            yield from _grants(uri, _READ)
        return
    if catalog:
        yield from _grants(uri, _WRITE, alias=True)


def _readable(registry: Registry, model: ResolvedModel) -> Check:
    """List the files and fetch a byte: credentials may open the registry, but not the storage behind it."""
    try:
        with explained(registry, f"The files of '{model.uri.text}'"):
            files = model.store.list()
        check_paths(file.path for file in files)
        if not any(file.path == "MLmodel" for file in files):
            return Check(
                "files", "failed", f"{len(files)} files, but no MLmodel", "Register the model again."
            )
        with explained(registry, f"The files of '{model.uri.text}'"):
            _fetch_a_byte(model.store, files[0].path)
    except StepError as error:
        return Check("files", "failed", error.what, error.fix)
    total = sum(file.bytes or 0 for file in files)
    return Check("files", "ok", f"{len(files)} files, {total} bytes, by {model.store.describe}")


def _fetch_a_byte(store: Store, path: str) -> None:
    try:
        body = store.open(path, 0, 1)
        next(iter(body.chunks), b"")
        body.close()
    except ExpiredError as error:
        fix = "Grant the job's principal read access to the storage behind the registry."
        raise StepError(f"{error}.", fix) from None
    except TransferError as error:
        raise StepError(f"{error}.", "Give the job a network route to the storage; try again.") from None


def _grants(uri: ModelUri, wanted: tuple[tuple[str, str], ...], alias: bool = False) -> Iterator[Check]:
    """Ask Unity Catalog which of the privileges this principal holds, and whether it may set an alias."""
    name = uri.name or ""
    catalog, schema, _ = name.split(".")
    names = {"catalog": catalog, "schema": f"{catalog}.{schema}", "function": name}
    try:
        from databricks.sdk import WorkspaceClient

        client = WorkspaceClient()
        me = client.current_user.me()
    except Exception as error:  # the SDK raises its own, requests' and ValueError
        yield Check("grants", "unknown", f"{type(error).__name__}: {_first_line(error)}")
        return
    principal = me.user_name or ""
    owner, reason = _owner(client, name)
    owns = owner in {principal, *(group.display for group in me.groups or [])}
    for kind, privilege in wanted:
        securable, words = names[kind], privilege.replace("_", " ")
        if kind == "function" and owns:
            yield Check(f"{words} on {securable}", "ok", f"{principal}, by ownership")
            continue
        try:
            held = _privileges(client, kind, securable, principal)
        except Exception as error:
            yield Check(f"{words} on {securable}", "unknown", f"{type(error).__name__}: {_first_line(error)}")
            continue
        if held & {privilege, _ALL}:
            yield Check(f"{words} on {securable}", "ok", principal)
        else:
            keyword = {"catalog": "CATALOG", "schema": "SCHEMA", "function": "FUNCTION"}[kind]
            yield Check(
                f"{words} on {securable}",
                "failed",
                f"{principal} does not hold it (privileges through groups may not be listed)",
                f"GRANT {words} ON {keyword} {securable} TO `{principal}`",
            )
    if alias:
        yield _may_set_alias(name, principal, owner, owns, reason)


def _may_set_alias(name: str, principal: str, owner: str, owns: bool, reason: str) -> Check:
    title = f"ownership of {name}"
    if not owner:
        return Check(title, "unknown", reason)
    if owns:
        return Check(title, "ok", owner)
    return Check(
        title,
        "failed",
        f"only its owner, {owner}, may set an alias (or a metastore admin), not {principal}",
        f"databricks registered-models update {name} --owner GROUP, with both in that group",
    )


def _owner(client: Any, name: str) -> tuple[str, str]:
    """Owner of the model, or "" and why it is not known."""
    try:
        owner = client.registered_models.get(name).owner
    except Exception as error:
        return "", f"{type(error).__name__}: {_first_line(error)}"
    return owner or "", "the workspace does not say who owns it"


def _privileges(client: Any, kind: str, securable: str, principal: str) -> set[str]:
    answer = client.grants.get_effective(kind, securable, principal=principal)
    return {
        str(getattr(privilege.privilege, "value", privilege.privilege))
        for assignment in answer.privilege_assignments or []
        for privilege in assignment.privileges or []
    }


def _first_line(error: Exception) -> str:
    return redact(str(error).partition(" Config: ")[0].splitlines()[0] if str(error) else "")[:200]


def text(checks: list[Check]) -> str:
    """The checks for a person, one a line."""
    mark = {"ok": "ok     ", "failed": "FAILED ", "unknown": "unknown"}
    lines = []
    for check in checks:
        lines.append(f"{mark[check.state]}  {check.name}: {check.detail}")
        if check.fix:
            lines.append(f"         -> {check.fix}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module. Exit code 1 when a check failed."""
    parser = argparse.ArgumentParser(prog="python -m steps.registry.doctor")
    parser.add_argument("model", help="the model URI that the pipeline will be given")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    checks = diagnose(args.model)
    print(json.dumps([asdict(check) for check in checks], indent=2) if args.json else text(checks))
    return int(any(check.state == "failed" for check in checks))


if __name__ == "__main__":
    sys.exit(main())
