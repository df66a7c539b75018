"""Everything a person should know before `upsert` changes anything: made by describe and list calls only.

A `Plan` holds the changes that `upsert.execute` applies, what each pipeline's new definition changes, what a
run and an hour of the endpoints cost, and the quotas that they need.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines import service, upsert
from pipelines.aws import Aws
from pipelines.definition import walk
from pipelines.difference import Difference, ParameterChange, compare
from pipelines.prices import HOURS_A_MONTH, Cost, Prices
from pipelines.settings import Settings

ASSUMED_MINUTES = 15  # of a job, start of the machine included, before any run was measured
PROCESSING_QUOTA, ENDPOINT_QUOTA = "{} for processing job usage", "{} for endpoint usage"
LOOK_BACK = 20  # executions to search for a measured one


@dataclass(frozen=True)
class Quota:
    """Instances that the configuration needs of one type, and how many the account may have.

    allowed: None when it could not be read; `note` then says why.
    """

    name: str
    needed: int
    allowed: float | None
    note: str = ""

    @property
    def enough(self) -> bool | None:
        """None when unknown."""
        return None if self.allowed is None else self.needed <= self.allowed

    def __str__(self) -> str:
        if self.allowed is None:
            return f"{self.name}: {self.needed} needed, allowed unknown ({self.note})"
        verdict = "enough" if self.enough else "TOO FEW: ask for more in Service Quotas, it takes days"
        return f"{self.name}: {self.needed} needed, {self.allowed:g} allowed, {verdict}"


@dataclass(frozen=True)
class Plan:
    """What `upsert` would do and what it means; nothing was changed to make it."""

    changes: tuple[upsert.Change, ...]
    costs: tuple[Cost, ...]
    quotas: tuple[Quota, ...]
    prices: str

    def lines(self) -> Iterator[str]:
        """For a person, in the order of the questions: what changes, is lost, costs; will it run."""
        yield from change_lines(self.changes)
        yield f"cost, an estimate: {self.prices}"
        yield from (f"       {one}" for one in self.costs)
        yield "quotas"
        yield from (f"       {one}" for one in self.quotas)


def make(aws: Aws, settings: Settings, pipelines: Mapping[str, Any]) -> Plan:
    """The plan for rendered pipelines (`upsert.render`) in the account as it is now."""
    changes = tuple(upsert.plan(aws, settings, pipelines))
    prices = Prices.load(settings.region)
    release = next((one.after for one in changes if one.name == settings.names.release_pipeline), "")
    return Plan(
        changes=changes,
        costs=tuple(costs(aws, settings, prices, json.loads(release) if release else None)),
        quotas=tuple(quotas(aws, needed_instances(settings))),
        prices=prices.source(),
    )


def change_lines(changes: Iterable[upsert.Change]) -> Iterator[str]:
    """Each resource, and below a pipeline that is updated what changes in its definition."""
    for change in changes:
        yield f"{change.action:<7}{change.kind} {change.name}"
        if change.action == "update" and change.after:
            yield from (f"         {line}" for line in describe(compare(change.before, change.after)))


def describe(difference: Difference) -> Iterator[str]:
    """A difference, one line a fact; steps that change alike are said together."""
    for parameter in difference.parameters:
        yield _parameter_line(parameter)
    alike: dict[tuple[Any, ...], list[str]] = {}
    for step in difference.steps:
        alike.setdefault((step.kind, tuple(map(str, step.edits)), step.cache), []).append(step.name)
    for (kind, edits, cache), names in alike.items():
        yield f"step{'s' * (len(names) > 1)} {', '.join(names)} {kind}" + (f"; {cache}" if cache else "")
        yield from (f"  {edit}" for edit in edits)
    for name, why in difference.caches:
        yield f"step {name} as before; {why}"


def _parameter_line(parameter: ParameterChange) -> str:
    edits = "; ".join(map(str, parameter.edits))
    warning = {"added": "a start may set it", "dropped": "a start that sets it will be refused"}
    return f"parameter {parameter.name} {parameter.kind}: {edits or warning[parameter.kind]}"


def costs(aws: Aws, settings: Settings, prices: Prices, definition: dict[str, Any] | None) -> Iterator[Cost]:
    """A run of the release pipeline, as last measured and at most; an hour and a month of each endpoint.

    definition: of the release pipeline, None in an account that only deploys.
    """
    if definition:
        yield from _release_costs(aws, settings, prices, definition)
    for name, kind, count in _endpoints(settings):
        extra = _in_an_update(settings, name, count)
        basis = f"{count} x {kind}; {extra} more while it is updated{_scaling(settings, name)}"
        yield Cost(f"endpoint {name}", prices.of(kind, 1, count), "an hour", basis)
        yield Cost(f"endpoint {name}", prices.of(kind, HOURS_A_MONTH, count), "a month", f"{HOURS_A_MONTH} h")


def _release_costs(
    aws: Aws, settings: Settings, prices: Prices, definition: dict[str, Any]
) -> Iterator[Cost]:
    jobs = dict(_jobs(definition))
    hours, basis = _measured_hours(aws, settings.names.release_pipeline, set(jobs))
    yield Cost("release", _sum(prices.of(kind, hours[name]) for name, kind in jobs.items()), "a run", basis)
    limit = settings.jobs.timeout_minutes / 60
    yield Cost(
        "release, at most",
        _sum(prices.of(kind, limit) for kind in jobs.values()),
        "a run",
        f"every job to its limit of {settings.jobs.timeout_minutes} minutes",
    )


def _endpoints(settings: Settings) -> Iterator[tuple[str, str, int]]:
    """Name, instance type and count of the account's endpoints, by the configured defaults."""
    for values, name, here in (
        (settings.parameters.release, "StagingEndpointName", settings.releases),
        (settings.parameters.production, "ProductionEndpointName", settings.deploys),
    ):
        if not here:
            continue
        yield str(values[name]), str(values["EndpointInstanceType"]), int(values["EndpointInstanceCount"])


def _jobs(definition: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each processing step with its instance type; a parameter counts as its default."""
    defaults = {one["Name"]: one.get("DefaultValue") for one in definition["Parameters"]}
    for step, _ in walk(definition["Steps"]):
        if step["Type"] == "Processing":
            kind = step["Arguments"]["ProcessingResources"]["ClusterConfig"]["InstanceType"]
            yield step["Name"], defaults[kind["Get"].split(".")[1]] if isinstance(kind, dict) else kind


def _measured_hours(aws: Aws, pipeline: str, jobs: set[str]) -> tuple[dict[str, float], str]:
    """Hours of each job in the newest execution that ran them all, else an assumption; and which it is."""
    assumed = dict.fromkeys(jobs, ASSUMED_MINUTES / 60)
    for one in service.newest(aws, pipeline, LOOK_BACK):
        if one["PipelineExecutionStatus"] == "Succeeded":
            execution = service.status(aws, one["PipelineExecutionArn"])
            seconds = {step.name: step.seconds for step in execution.steps if step.seconds is not None}
            if jobs <= seconds.keys():
                return {name: seconds[name] / 3600 for name in jobs}, f"as long as execution {execution.id}"
    return assumed, f"{ASSUMED_MINUTES} minutes a job assumed, no complete execution yet"


def needed_instances(settings: Settings) -> dict[str, int]:
    """Quota name to instances: one run at a time, both endpoints at their largest, one in an update."""
    release = settings.parameters.release
    # CompileKernel and Evaluate follow each other
    processing = Counter({str(release["ProcessingInstanceType"]): 1} if settings.releases else {})
    processing[settings.jobs.control_instance_type] += 1
    serving: Counter[str] = Counter()
    updating: Counter[str] = Counter()
    scaling = settings.deployment.scaling
    for name, kind, count in _endpoints(settings):
        most = scaling.max_instances if scaling and _is_production(settings, name) else count
        serving[kind] += most
        updating[kind] = max(updating[kind], _in_an_update(settings, name, most))
    return {
        **{PROCESSING_QUOTA.format(kind): count for kind, count in processing.items()},
        **{ENDPOINT_QUOTA.format(kind): count for kind, count in (serving + updating).items()},
    }


def _is_production(settings: Settings, endpoint: str) -> bool:
    return endpoint == settings.parameters.production["ProductionEndpointName"]


def _in_an_update(settings: Settings, endpoint: str, instances: int) -> int:
    """Instances that an update needs besides the endpoint's own; staging gets a whole second fleet."""
    return settings.deployment.extra(instances) if _is_production(settings, endpoint) else instances


def _scaling(settings: Settings, endpoint: str) -> str:
    scaling = settings.deployment.scaling
    if not scaling or not _is_production(settings, endpoint):
        return ""
    return f"; {scaling.min_instances} to {scaling.max_instances} as it scales"


def quotas(aws: Aws, needed: Mapping[str, int]) -> Iterator[Quota]:
    """Each need beside the account's quota. An identity that may not read quotas gets the needs alone."""
    from botocore.exceptions import ClientError

    allowed: dict[str, float] = {}
    note = "the service knows no quota of this name"
    try:
        for page in aws.quotas.get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker"):
            allowed |= {one["QuotaName"]: one["Value"] for one in page["Quotas"]}
    except ClientError as error:
        detail = error.response["Error"]
        note = f"{detail['Code']}: look at Service Quotas, Amazon SageMaker"
    for name, count in needed.items():
        yield Quota(name, count, allowed.get(name), "" if name in allowed else note)


def _sum(parts: Iterator[float | None]) -> float | None:
    known = list(parts)
    return None if any(one is None for one in known) else sum(one for one in known if one is not None)
