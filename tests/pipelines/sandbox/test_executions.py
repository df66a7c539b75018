"""Pipelines run for real: parameters in, S3 out, branches, failures, parallel steps, stop, retry, cache."""

from __future__ import annotations

import hashlib
import json
import time
import uuid

import pytest
from botocore.exceptions import ClientError

from tests.pipelines.sandbox.conftest import Aws

WRITE = """
import json, sys
with open("/opt/ml/processing/output/evaluation/evaluation.json", "w") as file:
    json.dump({"gate": {"speedup": float(sys.argv[1])}}, file)
"""
READ = """
import json
found = json.load(open("/opt/ml/processing/input/ev/evaluation.json"))
print("got", found)
open("/opt/ml/processing/output/o/copy", "w").write(str(found))
"""


def gate(aws: Aws) -> tuple[list[dict], list[dict]]:
    evaluate = aws.script(
        "Evaluate",
        WRITE,
        {"Std:Join": {"On": "", "Values": [{"Get": "Parameters.Speedup"}]}},
        outputs=("evaluation",),
        PropertyFiles=[
            {"PropertyFileName": "Evaluation", "OutputName": "evaluation", "FilePath": "evaluation.json"}
        ],
    )
    measured = {
        "Std:JsonGet": {
            "PropertyFile": {"Get": "Steps.Evaluate.PropertyFiles.Evaluation"},
            "Path": "gate.speedup",
        }
    }
    use = aws.script(
        "Use",
        READ,
        outputs=("o",),
        inputs={"ev": {"Get": "Steps.Evaluate.ProcessingOutputConfig.Outputs['evaluation'].S3Output.S3Uri"}},
    )
    message = {
        "Std:Join": {"On": " ", "Values": ["speedup", measured, "is below", {"Get": "Parameters.MinSpeedup"}]}
    }
    condition = {
        "Name": "Gate",
        "Type": "Condition",
        "Arguments": {
            "Conditions": [
                {
                    "Type": "GreaterThanOrEqualTo",
                    "LeftValue": measured,
                    "RightValue": {"Get": "Parameters.MinSpeedup"},
                }
            ],
            "IfSteps": [use],
            "ElseSteps": [{"Name": "GateFailed", "Type": "Fail", "Arguments": {"ErrorMessage": message}}],
        },
    }
    parameters = [
        {"Name": "Speedup", "Type": "Float", "DefaultValue": 2.0},
        {"Name": "MinSpeedup", "Type": "Float", "DefaultValue": 1.5},
    ]
    return [evaluate, condition], parameters


def test_taken_branch_runs_and_the_other_is_not_listed(aws: Aws, name: str) -> None:
    aws.create(name, *gate(aws))
    execution, steps = aws.run(name)
    assert execution["PipelineExecutionStatus"] == "Succeeded", steps
    assert list(steps) == ["Evaluate", "Gate", "Use"]
    assert steps["Gate"]["Metadata"]["Condition"]["Outcome"] == "True"
    identifier = execution["PipelineExecutionArn"].rsplit("/", 1)[-1]
    assert aws.get(f"{identifier}/Use/o/copy") == b"{'gate': {'speedup': 2.0}}"
    job = steps["Use"]["Metadata"]["ProcessingJob"]["Arn"].rsplit("/", 1)[-1]
    assert job.startswith(f"pipelines-{identifier}-Use-")
    logs = aws.client("logs")
    stream = logs.describe_log_streams(logGroupName="/aws/sagemaker/ProcessingJobs", logStreamNamePrefix=job)[
        "logStreams"
    ]
    events = logs.get_log_events(
        logGroupName="/aws/sagemaker/ProcessingJobs", logStreamName=stream[0]["logStreamName"]
    )
    assert [e["message"] for e in events["events"]] == ["got {'gate': {'speedup': 2.0}}"]


def test_failing_gate_says_what_was_measured_and_allowed(aws: Aws, name: str) -> None:
    aws.create(name, *gate(aws))
    execution, steps = aws.run(name, Speedup="1.25")
    assert execution["PipelineExecutionStatus"] == "Failed"
    assert execution["FailureReason"] == "Step failure: One or multiple steps failed."
    assert list(steps) == ["Evaluate", "Gate", "GateFailed"]
    assert steps["GateFailed"]["FailureReason"] == "speedup 1.25 is below 1.5"
    assert steps["GateFailed"]["Metadata"]["Fail"]["ErrorMessage"] == "speedup 1.25 is below 1.5"


def test_independent_steps_run_at_the_same_time(aws: Aws, name: str) -> None:
    code = "import time; time.sleep(1)"
    aws.create(
        name, [aws.script("A", code), aws.script("B", code), aws.script("C", "1", DependsOn=["A", "B"])]
    )
    _, steps = aws.run(name)
    starts = {n: s["StartTime"] for n, s in steps.items()}
    assert abs((starts["A"] - starts["B"]).total_seconds()) < 0.5
    assert starts["C"] >= max(steps["A"]["EndTime"], steps["B"]["EndTime"])


def test_parallelism_can_be_limited(aws: Aws, name: str) -> None:
    steps = [aws.script(n, "1") for n in "AB"]
    aws.create(name, steps, ParallelismConfiguration={"MaxParallelExecutionSteps": 1})
    _, done = aws.run(name)
    assert done["B"]["StartTime"] >= done["A"]["EndTime"]


def test_exit_message_and_code_become_the_failure_reason(aws: Aws, name: str) -> None:
    code = "import sys; open('/opt/ml/output/message', 'w').write('no weights: log it again'); sys.exit(3)"
    aws.create(name, [aws.script("Pull", code), aws.script("Next", "1", DependsOn=["Pull"])])
    execution, steps = aws.run(name)
    assert execution["PipelineExecutionStatus"] == "Failed"
    assert list(steps) == ["Pull"], "what depends on a failed step never starts"
    reason = "AlgorithmError: no weights: log it again, exit code: 3"
    assert steps["Pull"]["FailureReason"] == reason
    job = aws.sagemaker.describe_processing_job(ProcessingJobName=job_name(steps["Pull"]))
    assert (job["ProcessingJobStatus"], job["FailureReason"]) == ("Failed", reason)
    assert job["ExitMessage"] == "no weights: log it again"


def test_a_step_of_another_branch_goes_on_when_one_fails(aws: Aws, name: str) -> None:
    steps = [aws.script("Bad", "raise SystemExit(1)"), aws.script("Good", "import time; time.sleep(.5)")]
    aws.create(name, [*steps, aws.script("After", "1", DependsOn=["Good"])])
    execution, done = aws.run(name)
    assert execution["PipelineExecutionStatus"] == "Failed"
    assert {n: s["StepStatus"] for n, s in done.items()} == {
        "Bad": "Failed",
        "Good": "Succeeded",
        "After": "Succeeded",
    }


def test_a_step_may_run_because_another_failed(aws: Aws, name: str) -> None:
    notify = aws.script("Notify", "1", DependsOn=[{"Step": "Bad", "Trigger": "Failed"}])
    aws.create(name, [aws.script("Bad", "raise SystemExit(1)"), notify])
    execution, steps = aws.run(name)
    assert execution["PipelineExecutionStatus"] == "CompletedWithFailures"
    assert steps["Notify"]["StepStatus"] == "Succeeded"


def test_missing_input_fails_as_the_service_words_it(aws: Aws, name: str) -> None:
    aws.create(name, [aws.script("Read", "1", inputs={"x": "s3://artifacts/nothing/here/"})])
    _, steps = aws.run(name)
    assert steps["Read"]["FailureReason"].startswith("ClientError: No S3 objects found under S3 URL")


def test_max_runtime_is_enforced(aws: Aws, name: str) -> None:
    step = aws.script("Slow", "import time; time.sleep(60)")
    step["Arguments"]["StoppingCondition"] = {"MaxRuntimeInSeconds": 1}
    aws.create(name, [step])
    _, steps = aws.run(name)
    assert "MaxRuntimeInSeconds of 1" in steps["Slow"]["FailureReason"]


def test_stop_ends_running_steps_and_retry_repeats_only_them(aws: Aws, name: str) -> None:
    slow = "import os, time; time.sleep(0 if os.path.exists(os.environ['FLAG']) else 60)"
    step = aws.script("Slow", slow, DependsOn=["First"])
    flag = aws.scripts / name
    step["Arguments"]["Environment"] = {"FLAG": str(flag)}
    aws.create(name, [aws.script("First", "1"), step])
    execution = aws.start(name)
    wait_for_status(aws, execution, "Slow", "Executing")
    aws.sagemaker.stop_pipeline_execution(PipelineExecutionArn=execution)
    assert aws.wait(execution)["PipelineExecutionStatus"] == "Stopped"
    steps = aws.steps(execution)
    assert {n: s["StepStatus"] for n, s in steps.items()} == {"First": "Succeeded", "Slow": "Stopped"}
    job = aws.sagemaker.describe_processing_job(ProcessingJobName=job_name(steps["Slow"]))
    assert job["ProcessingJobStatus"] == "Stopped"
    with pytest.raises(ClientError, match="cannot be stopped"):
        aws.sagemaker.stop_pipeline_execution(PipelineExecutionArn=execution)

    flag.touch()
    aws.sagemaker.retry_pipeline_execution(PipelineExecutionArn=execution)
    assert aws.wait(execution)["PipelineExecutionStatus"] == "Succeeded"
    again = aws.steps(execution)
    assert again["First"]["StartTime"] == steps["First"]["StartTime"]
    assert (again["First"]["AttemptCount"], again["Slow"]["AttemptCount"]) == (1, 2)


def test_cached_step_is_not_run_again(aws: Aws, name: str) -> None:
    code = "import time; open('/opt/ml/processing/output/o/t', 'w').write(str(time.time()))"
    step = aws.script("Work", code, {"Get": "Parameters.P"}, outputs=("o",))
    step["CacheConfig"] = {"Enabled": True, "ExpireAfter": "PT1H"}
    uri = {"Get": "Steps.Work.ProcessingOutputConfig.Outputs['o'].S3Output.S3Uri"}
    use = aws.script("Use", "print(open('/opt/ml/processing/input/o/t').read())", inputs={"o": uri})
    aws.create(name, [step, use], [{"Name": "P", "Type": "String", "DefaultValue": "1"}])
    first, _ = aws.run(name)
    second, steps = aws.run(name)
    hit = steps["Work"]["CacheHitResult"]["SourcePipelineExecutionArn"]
    assert hit == first["PipelineExecutionArn"]
    assert second["PipelineExecutionStatus"] == "Succeeded", "the output of the first execution is read"
    _, other = aws.run(name, P="2")
    assert "CacheHitResult" not in other["Work"]


def test_same_token_gives_the_same_execution(aws: Aws, name: str) -> None:
    aws.create(name, [aws.script("A", "1")])
    token = str(uuid.uuid4())
    arns = {
        aws.sagemaker.start_pipeline_execution(PipelineName=name, ClientRequestToken=token)[
            "PipelineExecutionArn"
        ]
        for _ in range(2)
    }
    assert len(arns) == 1
    aws.wait(arns.pop())


def test_lists_executions_parameters_and_the_definition_that_ran(aws: Aws, name: str) -> None:
    parameters = [
        {"Name": "Text", "Type": "String", "DefaultValue": "a"},
        {"Name": "Flag", "Type": "Boolean", "DefaultValue": True},
    ]
    aws.create(name, [aws.script("A", "1")], parameters)
    execution, _ = aws.run(name, Text="b")
    arn = execution["PipelineExecutionArn"]
    given = aws.sagemaker.list_pipeline_parameters_for_execution(PipelineExecutionArn=arn)[
        "PipelineParameters"
    ]
    assert given == [{"Name": "Text", "Value": "b"}, {"Name": "Flag", "Value": "true"}]
    text = aws.sagemaker.describe_pipeline_definition_for_execution(PipelineExecutionArn=arn)[
        "PipelineDefinition"
    ]
    assert json.loads(text)["Steps"][0]["Name"] == "A"
    listed = aws.sagemaker.list_pipeline_executions(PipelineName=name)["PipelineExecutionSummaries"]
    assert [s["PipelineExecutionArn"] for s in listed] == [arn]


def test_a_job_sees_its_own_folders_and_only_its_own_variables(aws: Aws, name: str, monkeypatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_HOST", "1")
    code = """
import json, os
config = json.load(open("/opt/ml/config/processingjobconfig.json"))
assert config["Environment"] == {"MINE": "1"}, config
assert json.load(open("/opt/ml/config/resourceconfig.json"))["current_host"] == "algo-1"
assert sorted(os.listdir("/opt/ml/processing/input")) == ["a"], os.listdir("/opt/ml/processing/input")
assert os.environ["MINE"] == "1" and "SECRET_OF_THE_HOST" not in os.environ
assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
try:
    open("/opt/ml/processing/input/a/x", "a").write("changed")
except OSError:
    print("read-only")
"""
    aws.put(f"{name}/x", b"original")
    step = aws.script("Look", code, inputs={"a": f"s3://artifacts/{name}/"})
    step["Arguments"]["Environment"] = {"MINE": "1"}
    check = "assert open('/opt/ml/processing/input/a/x').read() == 'original'"
    after = aws.script("Check", check, inputs={"a": f"s3://artifacts/{name}/"}, DependsOn=["Look"])
    aws.create(name, [step, after])
    execution, steps = aws.run(name)
    assert execution["PipelineExecutionStatus"] == "Succeeded", steps


def test_processing_jobs_work_without_a_pipeline(aws: Aws, name: str) -> None:
    request = aws.script("x", "open('/opt/ml/processing/output/o/f', 'w').write('done')")["Arguments"]
    request["ProcessingOutputConfig"] = {
        "Outputs": [
            {
                "OutputName": "o",
                "S3Output": {
                    "S3Uri": f"s3://artifacts/{name}/o",
                    "LocalPath": "/opt/ml/processing/output/o",
                    "S3UploadMode": "EndOfJob",
                },
            }
        ]
    }
    aws.sagemaker.create_processing_job(ProcessingJobName=name, **request)
    aws.sagemaker.get_waiter("processing_job_completed_or_stopped").wait(
        ProcessingJobName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 20}
    )
    assert aws.get(f"{name}/o/f") == b"done"
    with pytest.raises(ClientError, match="already exists"):
        aws.sagemaker.create_processing_job(ProcessingJobName=name, **request)
    listed = aws.sagemaker.list_processing_jobs(NameContains=name)["ProcessingJobSummaries"]
    assert [j["ProcessingJobStatus"] for j in listed] == ["Completed"]


def job_name(step: dict) -> str:
    return step["Metadata"]["ProcessingJob"]["Arn"].rsplit("/", 1)[-1]


def wait_for_status(aws: Aws, execution: str, step: str, status: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if aws.steps(execution).get(step, {}).get("StepStatus") == status:
            return
        time.sleep(0.05)
    raise TimeoutError(aws.steps(execution))


def test_outputs_are_ordinary_objects(aws: Aws, name: str) -> None:
    code = "open('/opt/ml/processing/output/o/f', 'wb').write(b'x' * 3_000_000)"
    aws.create(name, [aws.script("Write", code, outputs=("o",))])
    execution, _ = aws.run(name)
    key = f"{execution['PipelineExecutionArn'].rsplit('/', 1)[-1]}/Write/o/f"
    head = aws.s3.head_object(Bucket="artifacts", Key=key)
    assert head["ContentLength"] == 3_000_000
    assert head["ETag"] == f'"{hashlib.md5(b"x" * 3_000_000).hexdigest()}"'
    part = aws.s3.get_object(Bucket="artifacts", Key=key, Range="bytes=10-19")["Body"].read()
    assert part == b"x" * 10
