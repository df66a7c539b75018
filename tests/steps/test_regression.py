"""The comparison with production: its arithmetic, its text, and which version it finds."""

from datetime import UTC, datetime

import boto3
import pytest
import torch
from botocore.stub import Stubber
from hypothesis import given
from hypothesis import strategies as st

from kernels.backends import ReferenceBackend
from kernels.workloads import parse_workload
from steps.evaluation import live_version, regression
from steps.evaluation.operator import Sizes
from steps.evaluation.production import Candidate, serve_as_production, worst_regression
from steps.evaluation.regression import OWN_TEXT, PIECE_CHARACTERS, PIECES, Score, agreed, quality
from steps.evaluation.schema import Production
from steps.model_package import ModelPackage
from tests.steps.test_verify_package import ARN, package

NOW = datetime(2026, 11, 24, tzinfo=UTC)
times = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=30)


@given(times)
def test_a_version_does_not_regress_against_itself(sample):
    assert agreed(sample, list(reversed(sample))) == 0


@given(times, st.floats(1.01, 10))
def test_a_slower_version_is_found_and_its_reverse_is_a_gain(sample, factor):
    slower = [factor * one for one in sample]
    assert agreed(slower, sample) == pytest.approx(100 * (factor - 1), rel=1e-6)
    assert agreed(sample, slower) < 0


def test_what_only_moves_the_median_is_noise():
    assert agreed([1.0, 90.0, 90.0], [1.0, 1.1, 1.2]) == 0
    assert agreed([1.1, 90.0, 90.0], [1.0, 1.1, 1.2]) == pytest.approx(10)


def test_the_worse_regression_counts_and_a_gain_keeps_its_sign():
    assert worst_regression(Production()) == 0
    assert worst_regression(Production(latency_regression_percent=-3, quality_regression_percent=-7)) == -3
    assert worst_regression(Production(latency_regression_percent=-3, quality_regression_percent=4)) == 4
    assert worst_regression(Production(quality_regression_percent=-7)) == -7  # latency was not compared


def test_the_same_kernel_twice_regresses_little():
    sizes = Sizes(4, 64, 16, torch.float32, torch.float32, 0.1)
    cases = parse_workload("1x64")
    found = regression.operator_regression(
        ReferenceBackend(), ReferenceBackend(), sizes, cases, torch.device("cpu")
    )
    assert abs(found) < 50  # the machine of a test may be busy; the default limits are for idle ones


def test_perplexity_is_of_tokens_or_of_bytes():
    pieces = ["abc", "de"]
    ours = Score(nats=3.0, token_ids=[[1, 2, 3], [4, 5]], choices=[torch.tensor([2, 3]), torch.tensor([9])])
    same = Score(nats=6.0, token_ids=[[1, 2, 3], [4, 5]], choices=[torch.tensor([2, 7]), torch.tensor([9])])
    found = quality(ours, same, pieces, one_vocabulary=True)
    assert found["perplexity_per"] == "token"
    assert found["candidate_perplexity"] == pytest.approx(torch.e)
    assert found["choices_equal_percent"] == pytest.approx(200 / 3)
    assert found["quality_regression_percent"] < 0
    other = Score(nats=6.0, token_ids=[[1], [4, 5]], choices=[torch.tensor([]), torch.tensor([9])])
    found = quality(ours, other, pieces, one_vocabulary=True)
    assert (found["perplexity_per"], found["choices_equal_percent"]) == ("byte", None)
    assert found["production_perplexity"] == pytest.approx(torch.e ** (6 / 5))


def test_a_model_is_judged_by_its_own_text_where_it_has_one(tmp_path):
    pieces, source = regression.evaluation_text(tmp_path, {"input_example": {"data": [["short"]]}})
    assert (len(pieces), {len(piece) for piece in pieces}) == (PIECES, {PIECE_CHARACTERS})
    assert "Python" in source
    example = {"columns": ["prompt"], "data": [["x" * 1500], ["y" * 1500]]}
    pieces, source = regression.evaluation_text(tmp_path, {"input_example": example})
    assert "".join(pieces) == "x" * 1500 + "\n\n" + "y" * 1500
    (tmp_path / OWN_TEXT).parent.mkdir()
    (tmp_path / OWN_TEXT).write_text("own")
    assert regression.evaluation_text(tmp_path, {"input_example": example})[0] == ["own"]


@pytest.fixture
def sagemaker():
    client = boto3.client(
        "sagemaker", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    with Stubber(client) as stubber:
        yield client, stubber


def serve(stubber, container, status="InService"):
    arn = "arn:aws:sagemaker:us-east-1:123456789012"
    endpoint = {"EndpointName": "p", "EndpointArn": f"{arn}:endpoint/p", "EndpointConfigName": "c"}
    dates = {"CreationTime": NOW, "LastModifiedTime": NOW}
    stubber.add_response("describe_endpoint", {**endpoint, **dates, "EndpointStatus": status})
    if status == "Creating":
        return
    variant = {"VariantName": "AllTraffic", "ModelName": "m", "InitialVariantWeight": 1.0}
    config = {"EndpointConfigName": "c", "EndpointConfigArn": f"{arn}:endpoint-config/c", "CreationTime": NOW}
    stubber.add_response("describe_endpoint_config", {**config, "ProductionVariants": [variant]})
    model = {"ModelName": "m", "ModelArn": f"{arn}:model/m", "CreationTime": NOW, "Containers": [container]}
    stubber.add_response("describe_model", model)


@pytest.mark.parametrize("status", ["InService", "Updating"])
def test_the_live_version_is_found_behind_the_endpoint(sagemaker, status):
    client, stubber = sagemaker
    serve(stubber, {"ModelPackageName": ARN}, status)
    stubber.add_response("describe_model_package", package(), {"ModelPackageName": ARN})
    found, reason = live_version.find(client, "p")
    assert (found.arn, reason) == (ARN, "")


def test_what_is_no_measure_is_named(sagemaker):
    client, stubber = sagemaker
    stubber.add_client_error("describe_endpoint", "ValidationException", 'Could not find endpoint "p".')
    assert live_version.find(client, "p") == (None, "There is no endpoint 'p' in this account.")
    serve(stubber, {"ModelPackageName": ARN}, "Creating")
    assert "is Creating and serves nobody" in live_version.find(client, "p")[1]
    serve(stubber, {"Image": "other:1"})
    assert "was made from no model package" in live_version.find(client, "p")[1]
    serve(stubber, {"ModelPackageName": ARN})
    stubber.add_response("describe_model_package", package(ModelApprovalStatus="Rejected"))
    assert "is live but Rejected" in live_version.find(client, "p")[1]


def test_a_kernel_for_another_machine_is_replaced_and_named(tmp_path):
    version = ModelPackage(
        ARN, "g", 3, "Completed", "Approved", "", "i", {"MLA_KERNEL_BACKEND": "cpu"}, "", "", {}
    )
    candidate = Candidate(tmp_path, tmp_path / "own", None, "reference", "float32", {})
    served = serve_as_production(version, tmp_path / "kernel", candidate)
    assert (served.kernel_dir, served.backend, served.kv_cache_dtype) == (
        tmp_path / "own",
        "reference",
        "float32",
    )
    assert "production's kernel cannot run on this machine" in served.kernel_reason
