"""SmokeTest against scripted answers of sagemaker-runtime."""

import io
import json
from datetime import UTC, datetime

import boto3
import pytest
from botocore.response import StreamingBody
from botocore.stub import Stubber

from steps import aws, smoke_test
from steps.job import StepError
from tests.steps.support import StepRun

CONFIG, NOW = "mla-release-abc", datetime(2026, 11, 24, tzinfo=UTC)
SMOKE = {"prompt": "The assert", "max_tokens": 3, "token_ids": [4, 5, 6], "text": " abc"}
BODY = b'{"prompt": "The assert", "max_tokens": 3, "temperature": 0, "return_token_ids": true}'


@pytest.fixture
def endpoint(monkeypatch):
    keys = {"region_name": "us-east-1", "aws_access_key_id": "x", "aws_secret_access_key": "x"}
    clients = {name: boto3.client(name, **keys) for name in ("sagemaker", "sagemaker-runtime")}
    monkeypatch.setattr(aws, "client", clients.__getitem__)
    with Stubber(clients["sagemaker-runtime"]) as stubber, Stubber(clients["sagemaker"]) as control:
        stubber.control = control
        serves(stubber)
        yield stubber
        stubber.assert_no_pending_responses()
        control.assert_no_pending_responses()


def serves(stubber: Stubber, config: str = CONFIG, status: str = "InService") -> None:
    """What DescribeEndpoint answers next."""
    described = {
        "EndpointName": "mla-staging",
        "EndpointArn": "arn:aws:sagemaker:us-east-1:123456789012:endpoint/mla-staging",
        "EndpointConfigName": config,
        "EndpointStatus": status,
        "CreationTime": NOW,
        "LastModifiedTime": NOW,
    }
    stubber.control.add_response("describe_endpoint", described, {"EndpointName": "mla-staging"})


def answers(stubber: Stubber, raw: bytes) -> None:
    stubber.add_response(
        "invoke_endpoint",
        {"Body": StreamingBody(io.BytesIO(raw), len(raw)), "ContentType": "application/json"},
        {
            "EndpointName": "mla-staging",
            "ContentType": "application/json",
            "Accept": "application/json",
            "Body": BODY,
        },
    )


def completion(*token_ids: int) -> bytes:
    choice = {"index": 0, "text": " abc", "finish_reason": "length", "token_ids": token_ids}
    return json.dumps({"object": "text_completion", "choices": [choice]}).encode()


def smoke(tmp_path) -> StepRun:
    run = StepRun(smoke_test, tmp_path).give("evaluation", "evaluation.json", {"model": {"smoke": SMOKE}})
    return run.start(endpoint_name="mla-staging", endpoint_config_name=CONFIG)


def test_equal_tokens_pass_and_the_warm_call_is_timed(endpoint, tmp_path):
    answers(endpoint, completion(4, 5, 6))
    answers(endpoint, completion(4, 5, 6))
    serves(endpoint)
    document = smoke(tmp_path).json("smoke", "smoke.json")
    assert document["token_ids"] == [4, 5, 6]
    assert document["tokens_equal"] is True
    assert 0 < document["latency_ms"] < 1000


@pytest.mark.parametrize(
    ("got", "where"), [((4, 5, 7), "token 2"), ((4, 5), "token 2"), ((4, 5, 6, 7), "token 3")]
)
def test_other_tokens_fail_and_show_both(endpoint, tmp_path, got, where):
    answers(endpoint, completion(*got))
    with pytest.raises(StepError) as failure:
        smoke(tmp_path)
    assert where in str(failure.value)
    assert f"expected [4, 5, 6], got {list(got)}" in str(failure.value)


@pytest.mark.parametrize("raw", [b"body", b"{}", b'{"choices": [{"text": "a"}]}'])
def test_an_answer_that_is_no_completion_is_quoted(endpoint, tmp_path, raw):
    answers(endpoint, raw)
    with pytest.raises(StepError, match="no completion with token ids") as failure:
        smoke(tmp_path)
    assert raw.decode() in str(failure.value)


def test_the_containers_own_error_reaches_the_message(endpoint, tmp_path):
    endpoint.add_client_error(
        "invoke_endpoint", "ModelError", 'Received server error (500): "NaN in logits"', 424
    )
    with pytest.raises(StepError, match=r"ModelError.*NaN in logits.*/aws/sagemaker/Endpoints/mla-staging"):
        smoke(tmp_path)


@pytest.mark.parametrize(
    ("config", "status"), [("mla-release-other", "InService"), (CONFIG, "Updating"), (CONFIG, "Failed")]
)
def test_another_releases_answer_is_none(endpoint, tmp_path, config, status):
    """The same tokens prove nothing when another release, or the one before a rollback, gave them."""
    answers(endpoint, completion(4, 5, 6))
    answers(endpoint, completion(4, 5, 6))
    serves(endpoint, config, status)
    with pytest.raises(StepError, match=f"is {status} with {config}, this release deployed {CONFIG}"):
        smoke(tmp_path)
