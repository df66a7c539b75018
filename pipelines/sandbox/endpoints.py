"""Endpoints: create, update with traffic shifting and rollback, describe, delete."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.sandbox.api import Account, Tags, created_within, now, ordered, page
from pipelines.sandbox.backends import Backends
from pipelines.sandbox.containers import ContainerFailure, Runtime
from pipelines.sandbox.deployment import Plan, RolledBack, Watch, plan
from pipelines.sandbox.endpoint import Endpoint
from pipelines.sandbox.errors import invalid
from pipelines.sandbox.fleets import Fleet, next_number
from pipelines.sandbox.models import EndpointConfigs, Models
from pipelines.sandbox.serving import Replica

MAX_REASON = 1024
_BUSY = ("Creating", "Updating", "RollingBack", "Deleting")
_SUMMARY = ("EndpointName", "EndpointArn", "CreationTime", "LastModifiedTime", "EndpointStatus")


class Endpoints:
    """The endpoints of the account.

    Args:
        serve: command that stands for an image's ``serve``.
        startup_s: replaces every variant's health-check timeout (the API's smallest is 60 s).
        changed: called with an endpoint's description after each change of status.
    """

    def __init__(
        self,
        account: Account,
        runtime: Runtime,
        models: Models,
        configs: EndpointConfigs,
        tags: Tags,
        serve: Sequence[str],
        startup_s: float | None,
        changed: Callable[[dict[str, Any]], None],
    ) -> None:
        self._account, self._runtime, self._models = account, runtime, models
        self._configs, self._tags, self._serve = configs, tags, serve
        self._startup_s, self._changed = startup_s, changed
        self._backends: Backends = runtime.backends
        self._endpoints: dict[str, Endpoint] = {}
        self._lock = threading.Lock()

    def actions(self) -> dict[str, Any]:
        """The actions answered here."""
        return {
            "CreateEndpoint": self._create,
            "UpdateEndpoint": self._update,
            "UpdateEndpointWeightsAndCapacities": self._update_weights,
            "DescribeEndpoint": lambda params: self.find(params["EndpointName"]).describe(),
            "ListEndpoints": self._list,
            "DeleteEndpoint": self._delete,
        }

    def find(self, name: str) -> Endpoint:
        """An endpoint by name.

        Raises:
            ServiceError: ValidationException, as the service answers for a missing one.
        """
        if name not in self._endpoints:
            raise invalid(f'Could not find endpoint "{self._arn(name)}".')
        return self._endpoints[name]

    def wait(self, name: str) -> dict[str, Any]:
        """Block until an endpoint is neither being created nor updated; its description."""
        endpoint = self.find(name)
        endpoint.settled.wait()
        return endpoint.describe()

    def cancel_all(self) -> None:
        """End all deployments (the sandbox is going down)."""
        for endpoint in list(self._endpoints.values()):
            endpoint.cancelled.set()

    def _create(self, params: dict[str, Any]) -> dict[str, Any]:
        name, time = params["EndpointName"], now()
        config = self._configs.find(params["EndpointConfigName"])
        with self._lock:
            if name in self._endpoints:
                raise invalid(f'Cannot create already existing endpoint "{self._arn(name)}".')
            record = {
                "EndpointName": name,
                "EndpointArn": self._arn(name),
                "EndpointConfigName": config["EndpointConfigName"],
                "EndpointStatus": "Creating",
                "CreationTime": time,
                "LastModifiedTime": time,
            }
            endpoint = self._endpoints[name] = Endpoint(record)
            endpoint.pending = self._fleet(name, config)
            endpoint.now_doing("Creating", f"Launching {endpoint.pending.instances} instance(s).")
        self._tags.set(self._arn(name), params.get("Tags", []))
        self._launch(self._bring_up, endpoint)
        return {"EndpointArn": self._arn(name)}

    def _update(self, params: dict[str, Any]) -> dict[str, Any]:
        endpoint = self.find(params["EndpointName"])
        config = self._configs.find(params["EndpointConfigName"])
        with self._lock:
            if endpoint.status in _BUSY:
                raise invalid(f'Cannot update in-progress endpoint "{endpoint.record["EndpointArn"]}".')
            if endpoint.status != "InService":
                raise invalid(
                    f"Cannot update an endpoint in status {endpoint.status}; delete it and create it anew."
                )
            self._refuse_while_scaling(endpoint, config)
            wanted = params.get("DeploymentConfig")
            if wanted is None and params.get("RetainDeploymentConfig"):
                wanted = endpoint.record.get("LastDeploymentConfig")
            instances = sum(v["InitialInstanceCount"] for v in config["ProductionVariants"])
            how = plan(wanted, instances, self._backends.alarm_states)
            endpoint.pending = self._fleet(params["EndpointName"], config)
            if params.get("RetainAllVariantProperties") and endpoint.fleet:
                dropped = params.get("ExcludeRetainedVariantProperties", [])
                endpoint.pending.retain(endpoint.fleet, {p["VariantPropertyType"] for p in dropped})
            endpoint.settled.clear()
            if how.rolling:
                endpoint.pending.run(how.shares[0])
            endpoint.share = 0.0
            endpoint.now_doing("Creating", f"Launching {endpoint.pending.running} instance(s).")
            endpoint.record |= {"EndpointStatus": "Updating", "LastModifiedTime": now()}
            endpoint.record.pop("FailureReason", None)
            if wanted is not None:
                endpoint.record["LastDeploymentConfig"] = wanted
        self._launch(lambda e: self._roll_out(e, how), endpoint)
        return {"EndpointArn": endpoint.record["EndpointArn"]}

    def _refuse_while_scaling(self, endpoint: Endpoint, config: dict[str, Any]) -> None:
        """The machine must stay: docs.aws.amazon.com/sagemaker/latest/dg/endpoint-scaling-update.html."""
        name = endpoint.record["EndpointName"]
        types = {one["VariantName"]: one["InstanceType"] for one in config["ProductionVariants"]}
        for variant in endpoint.fleet.variants if endpoint.fleet else ():
            same = types.get(variant.name) == variant.config["InstanceType"]
            if not same and self._backends.scales(name, variant.name):
                raise invalid(
                    f"Variant {variant.name} of endpoint {name} is a scalable target: deregister it before "
                    f"it is removed or its instance type changes."
                )

    def _launch(self, work: Callable[[Endpoint], None], endpoint: Endpoint) -> None:
        self._changed(endpoint.describe())
        name = f"endpoint-{endpoint.record['EndpointName']}"
        threading.Thread(target=work, args=(endpoint,), name=name, daemon=True).start()

    def _fleet(self, endpoint: str, config: dict[str, Any]) -> Fleet:
        def replica(variant: dict[str, Any], model: dict[str, Any]) -> Replica:
            return Replica(self._runtime, endpoint, variant, model, self._serve, next_number())

        return Fleet(config, self._models.container, replica)

    def _bring_up(self, endpoint: Endpoint) -> None:
        fleet = endpoint.pending
        assert fleet
        try:
            fleet.start(self._startup_s, endpoint.cancelled)
        except Exception as error:
            fleet.stop()
            endpoint.pending = None
            self._settle(endpoint, "Failed", _reason(error))
            return
        endpoint.fleet, endpoint.pending = fleet, None
        self._settle(endpoint, "InService")

    def _roll_out(self, endpoint: Endpoint, how: Plan) -> None:
        new, old = endpoint.pending, endpoint.fleet
        assert new
        assert old
        watch = Watch(how, self._backends.alarm_states, lambda: _trouble(new), endpoint.cancelled.is_set)
        try:
            watch.check_alarms()  # before anything is started
            new.start(self._startup_s, endpoint.cancelled)
            for share in how.shares:
                _shift(endpoint, how, share)
                words = f"Baking for {how.bake_s:g} seconds with {share:.0%} of the traffic."
                endpoint.now_doing("Baking", words)
                watch.wait(how.bake_s)
            endpoint.cancelled.wait(how.termination_wait_s)
        except Exception as error:
            endpoint.record["EndpointStatus"] = "RollingBack"
            self._changed(endpoint.describe())
            for share in how.back_from(endpoint.share):
                _shift(endpoint, how, share)
            old.run(1.0)
            endpoint.share = 0.0
            new.stop()
            endpoint.pending = None
            self._settle(endpoint, "InService", _reason(error))
            return
        new.run(1.0)
        endpoint.fleet, endpoint.pending, endpoint.share = new, None, 0.0
        endpoint.record["EndpointConfigName"] = new.name
        old.stop()
        self._settle(endpoint, "InService")

    def _settle(self, endpoint: Endpoint, status: str, reason: str | None = None) -> None:
        with self._lock:
            if endpoint.status == "Deleting":
                endpoint.settled.set()
                return
            endpoint.record |= {"EndpointStatus": status, "LastModifiedTime": now()}
            if reason:
                endpoint.record["FailureReason"] = reason[:MAX_REASON]
        endpoint.settled.set()
        self._changed(endpoint.describe())

    def _update_weights(self, params: dict[str, Any]) -> dict[str, Any]:
        endpoint = self.find(params["EndpointName"])
        with self._lock:
            if endpoint.status != "InService" or endpoint.fleet is None:
                raise invalid(f'Cannot update in-progress endpoint "{endpoint.record["EndpointArn"]}".')
            for wanted in params["DesiredWeightsAndCapacities"]:
                try:
                    variant = endpoint.fleet.pick(wanted["VariantName"])
                except LookupError as error:
                    raise invalid(f"Endpoint {params['EndpointName']}: {error}.") from None
                variant.weight = wanted.get("DesiredWeight", variant.weight)
                variant.instances = wanted.get("DesiredInstanceCount", variant.instances)
                variant.running = variant.instances
            endpoint.record["LastModifiedTime"] = now()
        return {"EndpointArn": endpoint.record["EndpointArn"]}

    def _list(self, params: dict[str, Any]) -> dict[str, Any]:
        found = [
            {k: e.record[k] for k in _SUMMARY}
            for e in list(self._endpoints.values())
            if params.get("NameContains", "") in e.record["EndpointName"]
            and params.get("StatusEquals", e.status) == e.status
            and created_within(e.record["CreationTime"], params, "CreationTime")
        ]
        keys = {"Name": "EndpointName", "CreationTime": "CreationTime", "Status": "EndpointStatus"}
        return page(ordered(found, params, keys, "CreationTime"), params, "Endpoints")

    def _delete(self, params: dict[str, Any]) -> None:
        endpoint = self.find(params["EndpointName"])
        with self._lock:
            if endpoint.status in _BUSY:
                raise invalid(f'Cannot update in-progress endpoint "{endpoint.record["EndpointArn"]}".')
            endpoint.record |= {"EndpointStatus": "Deleting", "LastModifiedTime": now()}
        endpoint.cancelled.set()
        self._launch(self._remove, endpoint)

    def _remove(self, endpoint: Endpoint) -> None:
        if endpoint.fleet:
            endpoint.fleet.stop()
        with self._lock:
            self._endpoints.pop(endpoint.record["EndpointName"], None)

    def _arn(self, name: str) -> str:
        return self._account.arn(f"endpoint/{name}")


def _shift(endpoint: Endpoint, how: Plan, share: float) -> None:
    """Give the new fleet this share of the traffic, and in a rolling update of the instances."""
    assert endpoint.fleet
    assert endpoint.pending
    if how.rolling:
        endpoint.pending.run(share)
        endpoint.fleet.run(1 - share)
    endpoint.share = share
    words = f"Activating traffic on {endpoint.pending.running} instance(s)."
    endpoint.now_doing("ActivatingTraffic", words)


def _trouble(fleet: Fleet) -> str | None:
    for variant in fleet.variants:
        status = variant.replica.exit_status()
        if status is not None:
            return f"The container of production variant {variant.name} exited with code {status}."
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, ContainerFailure | RolledBack):
        return str(error)
    return f"SandboxFault: {type(error).__name__}: {error}"
