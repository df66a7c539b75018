"""A failure's mail says which step failed, when and why: the template's rules, real events."""

from __future__ import annotations

import json
from typing import Any

from tests.config.template import WATCHING, Stack, load
from tests.pipelines.sandbox.conftest import Aws
from tests.pipelines.sandbox.test_endpoints import create, model, settle
from tests.pipelines.sandbox.test_registry_and_events import package


def mails(aws: Aws, name: str) -> Any:
    """The template's rules and topic in the sandbox, with a queue in the place of the mailbox: its reader."""
    account = aws.sagemaker.describe_pipeline(PipelineName=f"{name}-release")["PipelineArn"].split(":")[4]
    stack = Stack(load(WATCHING), {"NamePrefix": name}, account=account)
    sns, sqs, events = (aws.client(one) for one in ("sns", "sqs", "events"))
    (topic,) = stack.of_type("AWS::SNS::Topic").values()
    arn = sns.create_topic(Name=topic["TopicName"])["TopicArn"]
    queue = sqs.create_queue(QueueName=f"{name}-mail")["QueueUrl"]
    address = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    sns.subscribe(TopicArn=arn, Protocol="sqs", Endpoint=address, Attributes={"RawMessageDelivery": "true"})
    for rule in stack.of_type("AWS::Events::Rule").values():
        assert [target["Arn"] for target in rule["Targets"]] == [arn]
        events.put_rule(Name=rule["Name"], EventPattern=json.dumps(rule["EventPattern"]))
        events.put_targets(Rule=rule["Name"], Targets=rule["Targets"])

    def read(count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            got = sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=5, MaxNumberOfMessages=10)
            assert got.get("Messages"), f"only {found}"
            found += [one["Body"] for one in got["Messages"]]
        assert not sqs.receive_message(QueueUrl=queue).get("Messages")
        return sorted(found)

    return read


def test_a_failed_step_and_its_execution_are_told_in_words(aws: Aws, name: str) -> None:
    why = 'No kernel for backend "hopper".'
    code = f"open('/opt/ml/output/message', 'w').write({why!r}); raise SystemExit(1)"
    aws.create(f"{name}-release", [aws.script("Good", "pass"), aws.script("CompileKernel", code)])
    read = mails(aws, name)
    arn = aws.start(f"{name}-release")
    ended = aws.wait(arn)
    execution, step = read(2)
    reason = next(one for one in aws.steps(arn).values() if one["StepStatus"] == "Failed")["FailureReason"]
    assert step.startswith("Step CompileKernel (Processing) failed at 2")
    assert f"Why: {reason} Where: {arn} " in step
    assert "mla-pipeline logs CompileKernel" in step
    assert execution.startswith(f"Execution {ended['PipelineExecutionDisplayName']} failed at 2")
    assert arn in execution


def test_a_steps_event_is_the_documented_one(aws: Aws, name: str) -> None:
    """docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html, pipeline step."""
    aws.create(name, [aws.script("Bad", "raise SystemExit(1)")])
    sqs, events = aws.client("sqs"), aws.client("events")
    queue = sqs.create_queue(QueueName=name)["QueueUrl"]
    address = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    title = "SageMaker Model Building Pipeline Execution Step Status Change"
    pattern = {"detail-type": [title], "detail": {"currentStepStatus": ["Failed"], "stepName": ["Bad"]}}
    events.put_rule(Name=name, EventPattern=json.dumps(pattern))
    events.put_targets(Rule=name, Targets=[{"Id": "q", "Arn": address}])
    execution = aws.start(name)
    aws.wait(execution)
    (message,) = sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=5)["Messages"]
    event = json.loads(message["Body"])
    pipeline = execution.partition("/execution/")[0]
    assert event["resources"] == [pipeline, execution]
    assert set(event["detail"]) == {
        "metadata",
        "stepStartTime",
        "stepEndTime",
        "stepName",
        "stepType",
        "previousStepStatus",
        "currentStepStatus",
        "pipelineArn",
        "pipelineExecutionArn",
        "failureReason",
    }
    assert set(event["detail"]["metadata"]) == {"processingJob"}
    assert set(event["detail"]["metadata"]["processingJob"]) == {"arn"}


def test_a_gate_says_its_own_words(aws: Aws, name: str) -> None:
    words = "The release misses a limit"
    aws.create(
        f"{name}-release", [{"Name": "GateFailed", "Type": "Fail", "Arguments": {"ErrorMessage": words}}]
    )
    read = mails(aws, name)
    arn = aws.start(f"{name}-release")
    aws.wait(arn)
    (step,) = (one for one in read(2) if one.startswith("Step"))
    assert step.startswith("Step GateFailed (Fail) failed at 2")
    assert words in step


def test_a_rollback_is_told_while_it_happens_and_why_by_the_step(aws: Aws, name: str) -> None:
    endpoint = f"{name}-production"
    create(aws, endpoint, model(aws, f"{name}-1"))
    aws.create(f"{name}-release", [aws.script("Good", "pass")])
    read = mails(aws, name)
    broken = model(aws, f"{name}-2", TOY_MODE="exit")
    aws.sagemaker.update_endpoint(EndpointName=endpoint, EndpointConfigName=broken)
    (mail,) = read(1)
    assert mail.startswith(f"Endpoint {endpoint} is ROLLING_BACK (configuration {name}-1).")
    assert settle(aws, endpoint)["EndpointConfigName"] == f"{name}-1"


def test_success_and_other_pipelines_send_nothing(aws: Aws, name: str) -> None:
    aws.create(f"{name}-release", [aws.script("Good", "pass")])
    aws.create(f"{name}-other", [aws.script("Bad", "raise SystemExit(1)")])
    read = mails(aws, name)
    for pipeline in ("release", "other"):
        aws.wait(aws.start(f"{name}-{pipeline}"))
    package(aws, f"{name}-models")
    assert read(0) == []


def test_an_event_without_a_reason_is_still_a_mail(aws: Aws, name: str) -> None:
    """EventBridge takes a path that leads nowhere as nothing."""
    arn = aws.create(f"{name}-release", [aws.script("Good", "pass")])
    read = mails(aws, name)
    pipeline = aws.sagemaker.describe_pipeline(PipelineName=arn)["PipelineArn"]
    detail = {"currentStepStatus": "Failed", "stepName": "Evaluate", "pipelineArn": pipeline}
    aws.sandbox.events.emit(
        "SageMaker Model Building Pipeline Execution Step Status Change", detail, pipeline
    )
    (mail,) = read(1)
    assert mail.startswith("Step Evaluate () failed at . Why:  Where:")
