"""Pipelines run for real: parameters in, S3 out, branches, failures, parallel steps, stop, retry, cache."""

from __future__ import annotations

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
