"""Runs lines of the AWS CLI by botocore's models, from which the CLI makes its own commands and options.

`aws SERVICE OPERATION --option VALUE ...`: lists take several values, `file://` reads a file. The CLI's few
hand-written commands (s3 cp, deploy, wait) are not known here.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from botocore import xform_name
from botocore.model import ServiceModel


def run(line: str, client: Callable[[str], Any], folder: Path) -> Any:
    """The answer to one line.

    client: a boto3 client by service. folder: of the files that the line names.
    Raises ValueError for a command or option that the service does not have.
    """
    if not line.startswith("aws "):
        raise ValueError(f"not a line for the AWS CLI: {line}")
    _, service, command, *options = shlex.split(line, comments=True)
    connected = client(service)
    model: ServiceModel = connected.meta.service_model
    operation = _named(command, model.operation_names, line)
    shape = model.operation_model(operation).input_shape
    members = shape.members if shape else {}
    request: dict[str, Any] = {}
    for option, values in _grouped(options):
        member = _named(option.removeprefix("--"), members, line)
        request[member] = _value(members[member].type_name, values, folder)
    return getattr(connected, xform_name(operation))(**request)


def _named(word: str, names: Any, line: str) -> str:
    found = [name for name in names if xform_name(name, "-") == word]
    if not found:
        raise ValueError(f"no '{word}': {line}")
    return str(found[0])


def _grouped(options: list[str]) -> list[tuple[str, list[str]]]:
    groups: list[tuple[str, list[str]]] = []
    for word in options:
        if word.startswith("--"):
            groups.append((word, []))
        else:
            groups[-1][1].append(word)
    return groups


def _value(kind: str, values: list[str], folder: Path) -> Any:
    if kind == "list":
        return values
    (value,) = values
    if value.startswith("file://"):
        return (folder / value.removeprefix("file://")).read_text(encoding="utf-8")
    return {"integer": int, "boolean": bool}.get(kind, str)(value)
