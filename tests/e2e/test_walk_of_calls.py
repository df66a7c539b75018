"""Every AWS call of a release and a promotion is allowed by the caller's role, and nothing else is."""

from __future__ import annotations

import pytest

from pipelines import service, versions
from pipelines.sandbox.calls import USER
from pipelines.settings import ROLES
from tests.config.iam_walk import Report, walk
from tests.config.recorded import calls
from tests.config.template import ROLES as TEMPLATE
from tests.config.template import Stack, load
from tests.e2e.conftest import QUICK, Chain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SERVICES_OWN = ("pipeline", "endpoint", "events")  # what acts for the service, besides the steps


@pytest.fixture(scope="module")
def promoted(chain: Chain) -> Chain:
    """The chain after a promotion that created production, one that updated it, and a release beside it."""
    settings, arn = chain.local.settings, chain.summary.model_package_arn
    endpoint = str(settings.parameters.production["ProductionEndpointName"])
    if versions.package(chain.aws, arn).status != "Approved":
        versions.decide(chain.aws, arn, "Approved", "")
        ended = service.wait(chain.aws, service.started_for(chain.aws, chain.production, arn, 30), 0.2, 180)
        assert ended.status == "Succeeded", service.reason(ended)
    other = "ml.c7i.4xlarge"
    update = service.start(
        chain.aws, chain.production, {"ModelPackageArn": arn, "EndpointInstanceType": other}
    )
    ended = service.wait(chain.aws, update, 0.2, 180)
    assert ended.status == "Succeeded", service.reason(ended)
    live = chain.aws.sagemaker.describe_endpoint(EndpointName=endpoint)["EndpointConfigName"]
    config = chain.aws.sagemaker.describe_endpoint_config(EndpointConfigName=live)
    assert config["ProductionVariants"][0]["InstanceType"] == other
    if not any((one.step, one.operation) == ("Evaluate", "DescribeModel") for one in chain.local.calls.all()):
        beside = service.wait(chain.aws, service.start(chain.aws, chain.release, QUICK), 0.2, 240)
        assert beside.step("Evaluate").status == "Succeeded", service.reason(beside)
    return chain


def stack(chain: Chain) -> Stack:
    """The infrastructure as this run's account would have it: its account, region, bucket and role."""
    settings, template = chain.local.settings, load(TEMPLATE)
    roles = [name for name, one in template["Resources"].items() if one["Type"] == "AWS::IAM::Role"]
    return Stack(
        template,
        {"ArtifactPrefix": settings.prefix, "Bucket": settings.bucket},
        account=settings.role.split(":")[4],
        region=settings.region,
        names=dict.fromkeys(roles, settings.role_name),
    )


def report(chain: Chain) -> Report:
    """The walk of everything that was not asked by a person or a test."""
    rendered, settings = stack(chain), chain.local.settings
    where = {"region": settings.region, "account": settings.role.split(":")[4]}
    recorded = [
        (one.step, one.service, one.operation, one.parameters)
        for one in chain.local.calls.all()
        if one.caller != USER
    ]
    # What an option asks for that this run does not use: sources of a kernel from the bucket (KernelSource).
    source = {"Bucket": settings.bucket, "Key": f"{settings.prefix}/kernel-sources/mine.tar.gz"}
    optional = [("CompileKernel", "s3", operation, source) for operation in ("HeadObject", "GetObject")]
    target = {"ServiceNamespace": "sagemaker", "ScalableDimension": "sagemaker:variant:DesiredInstanceCount"}
    optional += [  # deployment.scaling
        ("DeployProduction", "application-autoscaling", operation, target)
        for operation in ("DeregisterScalableTarget", "RegisterScalableTarget", "PutScalingPolicy")
    ]
    return walk(
        (permission for one in [*recorded, *optional] for permission in calls(*one, **where)), rendered
    )


def test_every_step_and_service_called_aws(promoted: Chain) -> None:
    callers = {one.step for one in promoted.local.calls.all()}
    assert {*ROLES, *SERVICES_OWN} <= callers


def test_every_call_is_allowed_by_the_callers_own_role(promoted: Chain) -> None:
    denied = report(promoted).denied
    assert denied == (), "\n".join(
        f"{call.step} {call.action} {call.resource}: {why}" for call, why in denied
    )


def test_no_role_allows_what_no_call_needed(promoted: Chain) -> None:
    assert report(promoted).unused == ()
