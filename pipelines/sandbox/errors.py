"""Errors of the emulated services, with the codes and HTTP statuses that clients branch on."""

from __future__ import annotations


class ServiceError(Exception):
    """An error a client of the service sees.

    Args:
        code: the service's error code, such as ``ValidationException``.
        message: what is wrong, where, and what to do.
        status: HTTP status; SageMaker answers 400 to nearly everything.
        fields: further members of the JSON body (``OriginalStatusCode`` of a ModelError).
    """

    def __init__(self, code: str, message: str, status: int = 400, fields: dict | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.status, self.fields = code, message, status, fields or {}


def invalid(message: str) -> ServiceError:
    """A wrong request: SageMaker's code for nearly every bad input, and for missing models and endpoints."""
    return ServiceError("ValidationException", message)


def not_found(message: str) -> ServiceError:
    """A pipeline, execution or job that does not exist."""
    return ServiceError("ResourceNotFound", message)


def conflict(message: str) -> ServiceError:
    """The resource is in a state that forbids the request."""
    return ServiceError("ConflictException", message)


def not_emulated(what: str, hint: str = "") -> ServiceError:
    """Something AWS has and the sandbox does not: refused by name instead of pretended."""
    text = f"The sandbox does not emulate {what}."
    return ServiceError("UnsupportedOperation", f"{text} {hint}".strip())


def unparsable(reason: str) -> ServiceError:
    """A pipeline definition that CreatePipeline and UpdatePipeline refuse."""
    return invalid(f"Unable to parse pipeline definition. {reason}")
