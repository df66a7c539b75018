"""The only door to moto's inner objects: S3 objects, logs, alarms, scalable targets, rules, IAM policies.

moto's backends are dictionaries in this very process; reading them directly spares an HTTP round trip per
object. Everything here is safe to call from several threads.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pipelines.sandbox.api import Account
from pipelines.sandbox.errors import ServiceError

_COPY_BYTES = 1 << 20


class NoSuchObject(LookupError):
    """A bucket or key that does not exist; the message names it."""


@dataclass(frozen=True)
class S3Object:
    """One stored object: bucket, key, size in bytes and a text that changes whenever its content does."""

    bucket: str
    key: str
    size: int
    revision: str


def parse_s3_uri(uri: str) -> tuple[str, str]:
    """``s3://bucket/a/b`` -> ``("bucket", "a/b")``.

    Raises:
        ValueError: no S3 URI.
    """
    parsed = urlparse(uri)
    if parsed.scheme != "s3" or not parsed.netloc:
        raise ValueError(f"'{uri}' is not an S3 URI (s3://bucket/key)")
    return parsed.netloc, parsed.path.lstrip("/")


class Backends:
    """moto's state of one account and region."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self._logs_lock = threading.Lock()  # moto's put_log_events is not thread-safe

    @staticmethod
    def reset() -> None:
        """Forget everything: moto's state belongs to the process, so a new sandbox starts from nothing."""
        from moto.moto_api._internal import moto_api_backend

        moto_api_backend.reset()

    def list_objects(self, bucket: str, prefix: str) -> list[S3Object]:
        """Objects under a prefix, by key.

        Raises:
            NoSuchObject: the bucket does not exist.
        """
        keys = sorted(k for k in list(self._bucket(bucket).keys.keys()) if k.startswith(prefix))
        return [found for key in keys if (found := self.find_object(bucket, key))]

    def find_object(self, bucket: str, key: str) -> S3Object | None:
        """One object, or None when there is none of this name (or its newest version is a delete marker)."""
        stored = self._bucket(bucket).keys.get(key)
        if stored is None or not hasattr(stored, "contentsize"):
            return None
        return S3Object(bucket, key, stored.contentsize, f"{stored.etag}/{stored.version_id}")

    def read_object(self, bucket: str, key: str, version: str | None = None) -> bytes:
        """The bytes of an object.

        Raises:
            NoSuchObject: bucket, key or version does not exist.
        """
        return b"".join(self._chunks(bucket, key, version))

    def copy_object_to(self, source: S3Object, target: Path) -> None:
        """Write an object to a file, 1 MiB at a time."""
        with target.open("wb") as file:
            for chunk in self._chunks(source.bucket, source.key, None):
                file.write(chunk)

    def put_object(self, bucket: str, key: str, value: bytes, kms_key_id: str | None = None) -> S3Object:
        """Store an object, encrypted with the key when one is given.

        Raises:
            NoSuchObject: the bucket does not exist.
        """
        self._bucket(bucket)
        encryption = "aws:kms" if kms_key_id else None
        stored = self._s3().put_object(bucket, key, value, encryption=encryption, kms_key_id=kms_key_id)
        return S3Object(bucket, key, stored.contentsize, f"{stored.etag}/{stored.version_id}")

    def put_file(self, bucket: str, key: str, path: Path, kms_key_id: str | None = None) -> S3Object:
        """Store a file as an object, 1 MiB at a time: moto's own way holds a large one in memory three times.

        Raises:
            NoSuchObject: the bucket does not exist.
        """
        self._bucket(bucket)
        with path.open("rb") as file:
            etag = hashlib.file_digest(file, "md5").hexdigest()
            encryption = "aws:kms" if kms_key_id else None
            stored = self._s3().put_object(
                bucket, key, b"", etag=etag, encryption=encryption, kms_key_id=kms_key_id
            )
            file.seek(0)
            with stored.lock:
                stored._value_buffer.seek(0)
                shutil.copyfileobj(file, stored._value_buffer, _COPY_BYTES)
                stored.contentsize = stored._value_buffer.tell()
        return S3Object(bucket, key, stored.contentsize, f"{stored.etag}/{stored.version_id}")

    def put_log_events(self, group: str, stream: str, events: list[dict[str, Any]]) -> None:
        """Append ``[{"timestamp": ms, "message": text}]`` to a log stream, made when missing."""
        from moto.logs import logs_backends

        logs = logs_backends[self.account.account_id][self.account.region]
        with self._logs_lock:
            if group not in logs.groups:
                logs.create_log_group(group, {})
            if stream not in logs.groups[group].streams:
                logs.create_log_stream(group, stream)
            if events:
                logs.put_log_events(group, stream, events)

    def alarm_states(self, names: list[str]) -> dict[str, str]:
        """State of each CloudWatch alarm that exists: OK, ALARM or INSUFFICIENT_DATA."""
        from moto.cloudwatch import cloudwatch_backends

        alarms = cloudwatch_backends[self.account.account_id][self.account.region].alarms
        return {name: alarms[name].state_value for name in names if name in alarms}

    def scales(self, endpoint: str, variant: str) -> bool:
        """Whether Application Auto Scaling has the variant's instances as a scalable target."""
        from moto.applicationautoscaling import applicationautoscaling_backends

        targets = applicationautoscaling_backends[self.account.account_id][self.account.region].targets
        resource = f"endpoint/{endpoint}/variant/{variant}"
        return resource in targets.get("sagemaker:variant:DesiredInstanceCount", {})

    def event_rules(self, bus: str = "default") -> list[Any]:
        """Enabled EventBridge rules of a bus (moto's Rule objects: name, event_pattern, targets)."""
        from moto.events import events_backends

        buses = events_backends[self.account.account_id][self.account.region].event_buses
        rules = list(buses[bus].rules.values()) if bus in buses else []
        return [rule for rule in rules if rule.state == "ENABLED"]

    def deliver(self, service: str, arn: str, text: str, group_id: str | None = None) -> None:
        """Send a message to an SNS topic (``sns``), an SQS queue (``sqs``) or a log group (``logs``).

        Raises:
            ServiceError: the topic or queue does not exist.
        """
        from moto.core.exceptions import ServiceException
        from moto.sns import sns_backends
        from moto.sqs import sqs_backends

        account, region = self.account.account_id, self.account.region
        try:
            if service == "sns":
                sns_backends[account][region].publish(text, arn=arn)
            elif service == "sqs":
                sqs_backends[account][region].send_message(arn.rsplit(":", 1)[-1], text, group_id=group_id)
            else:
                group = arn.split(":log-group:")[-1].removesuffix(":*")
                event = {"timestamp": int(time.time() * 1000), "message": text}
                self.put_log_events(group, str(uuid.uuid4()), [event])
        except ServiceException as error:
            raise ServiceError("ResourceNotFoundException", f"{arn}: {error}") from None

    def has_role(self, arn: str) -> bool:
        """Whether an IAM role exists."""
        from moto.iam import iam_backends

        roles = iam_backends[self.account.account_id]["aws"].roles.values()
        return any(role.arn == arn for role in list(roles))

    def _chunks(self, bucket: str, key: str, version: str | None) -> Iterator[bytes]:
        stored = self._bucket(bucket).keys.get(key)
        if version is not None:
            versions = self._bucket(bucket).keys.getlist(key, [])
            stored = next((v for v in versions if v.version_id == version), None)
        if stored is None or not hasattr(stored, "contentsize"):
            raise NoSuchObject(f"s3://{bucket}/{key} does not exist")
        at = 0
        while at < stored.contentsize:
            with stored.lock:  # the buffer's position is shared with moto's own readers
                stored._value_buffer.seek(at)
                chunk = stored._value_buffer.read(_COPY_BYTES)
            if not chunk:
                break
            at += len(chunk)
            yield chunk

    def _s3(self) -> Any:
        from moto.s3.models import s3_backends

        return s3_backends[self.account.account_id]["aws"]

    def _bucket(self, name: str) -> Any:
        buckets = self._s3().buckets
        if name not in buckets:
            raise NoSuchObject(f"bucket '{name}' does not exist")
        return buckets[name]
