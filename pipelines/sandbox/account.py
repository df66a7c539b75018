"""What config/infrastructure.yaml makes on AWS, for a sandbox: the artifact bucket and the role."""

from __future__ import annotations

import json

import boto3
from botocore.exceptions import ClientError

_TRUSTED = ("sagemaker.amazonaws.com", "events.amazonaws.com")


def prepare_account(endpoint_url: str, *, bucket: str, role_name: str, region: str) -> str:
    """Make the bucket and the role if they are missing; returns the role's ARN. May be called again.

    Args:
        endpoint_url: the sandbox. The credentials sent are meaningless constants, so this never reaches an
            account.
    """
    keys = {"aws_access_key_id": "sandbox", "aws_secret_access_key": "sandbox", "region_name": region}
    s3 = boto3.client("s3", endpoint_url=endpoint_url, **keys)
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    try:
        s3.create_bucket(Bucket=bucket, **place)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            raise
    return _role(boto3.client("iam", endpoint_url=endpoint_url, **keys), role_name)


def _role(iam, name: str) -> str:  # type: ignore[no-untyped-def]  # boto3 clients have no static type
    trust = {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Principal": {"Service": list(_TRUSTED)}, "Action": "sts:AssumeRole"}
        ],
    }
    everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
    try:
        arn = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
    except ClientError as error:
        if error.response["Error"]["Code"] != "EntityAlreadyExists":
            raise
        return str(iam.get_role(RoleName=name)["Role"]["Arn"])
    iam.put_role_policy(RoleName=name, PolicyName="sandbox", PolicyDocument=json.dumps(everything))
    return str(arn)
