"""SmokeTest against scripted answers of sagemaker-runtime."""

import io
import json

import boto3
import pytest
from botocore.response import StreamingBody
from botocore.stub import Stubber

from steps import aws, smoke_test
from steps.job import StepError
from tests.steps.support import StepRun

SMOKE = {"prompt": "The assert", "max_tokens": 3, "token_ids": [4, 5, 6], "text": " abc"}
BODY = b'{"prompt": "The assert", "max_tokens": 3, "temperature": 0, "return_token_ids": true}'


@pytest.fixture
def endpoint(monkeypatch):
    client = boto3.client(
        "sagemaker-runtime", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    monkeypatch.setattr(aws, "client", lambda name: client)
    with Stubber(client) as stubber:
        yield stubber
        stubber.assert_no_pending_responses()


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
    return run.start(endpoint_name="mla-staging")


def test_equal_tokens_pass_and_the_warm_call_is_timed(endpoint, tmp_path):
    answers(endpoint, completion(4, 5, 6))
    answers(endpoint, completion(4, 5, 6))
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
