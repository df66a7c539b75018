"""SmokeTest: the staging endpoint answers, over the public API, with the very tokens that Evaluate saw."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from steps import aws
from steps.deployed_endpoint import Endpoint
from steps.job import Job, StepError, log, run


@dataclass(frozen=True)
class Answer:
    """One completion: token ids, decoded text, wall time of the whole call in milliseconds."""

    token_ids: list[int]
    text: str
    milliseconds: float


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint-name", required=True)
    parser.add_argument("--endpoint-config-name", required=True, help="what this release deployed there")


def main(job: Job) -> None:
    """Invoke the endpoint with the evaluation's prompt, compare token ids, and write smoke/smoke.json."""
    smoke = job.read_json("evaluation", "evaluation.json")["model"]["smoke"]
    sagemaker, runtime = aws.client("sagemaker"), aws.client("sagemaker-runtime")
    endpoint: str = job.args.endpoint_name
    config: str = job.args.endpoint_config_name
    require_ours(sagemaker, endpoint, config)
    first = invoke(runtime, endpoint, smoke["prompt"], smoke["max_tokens"])
    compare(endpoint, smoke["token_ids"], first)
    second = invoke(runtime, endpoint, smoke["prompt"], smoke["max_tokens"])  # warm connection, warm caches
    compare(endpoint, smoke["token_ids"], second)
    require_ours(sagemaker, endpoint, config)
    log.info(
        "%s answered %d tokens as evaluated: first call %.0f ms, second %.0f ms",
        endpoint,
        len(second.token_ids),
        first.milliseconds,
        second.milliseconds,
    )
    job.write_json(
        "smoke",
        "smoke.json",
        {
            "schema_version": 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "endpoint_name": endpoint,
            "endpoint_config_name": config,
            "prompt": smoke["prompt"],
            "max_tokens": smoke["max_tokens"],
            "token_ids": second.token_ids,
            "text": second.text,
            "tokens_equal": True,
            "first_call_ms": round(first.milliseconds, 2),
            "latency_ms": round(second.milliseconds, 2),
            "tokens_per_s": round(len(second.token_ids) / second.milliseconds * 1e3, 2),
        },
    )


def require_ours(sagemaker: Any, name: str, config: str) -> None:
    """Raise StepError unless all of the endpoint serves this release.

    Another one may move it meanwhile, and an update that was rolled back ends InService with the one before.
    """
    endpoint = Endpoint.find(sagemaker, name)
    if not endpoint or not endpoint.serves(config):
        found = f"is {endpoint.status} with {endpoint.config}" if endpoint else "is gone"
        raise StepError(
            f"Endpoint '{name}' {found}, this release deployed {config}.",
            "It was rolled back (read its log group), or another release moved it: start again after that.",
        )


def invoke(runtime: Any, endpoint: str, prompt: str | list[int], max_tokens: int) -> Answer:
    """One greedy completion over InvokeEndpoint.

    Raises:
        StepError: the call failed (with the container's own message), or its body is no completion.
    """
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
    started = time.perf_counter()
    with aws.explained(
        f"Invoking endpoint '{endpoint}'", f"Read the log group /aws/sagemaker/Endpoints/{endpoint}."
    ):
        response = runtime.invoke_endpoint(
            EndpointName=endpoint,
            ContentType="application/json",
            Accept="application/json",
            Body=json.dumps(body).encode(),
        )
        raw = response["Body"].read()
    milliseconds = (time.perf_counter() - started) * 1e3
    try:
        choice = json.loads(raw)["choices"][0]
        return Answer([int(token) for token in choice["token_ids"]], choice["text"], milliseconds)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise StepError(
            f"Endpoint '{endpoint}' answered no completion with token ids: {raw[:200]!r}.",
            "Check that the endpoint runs this project's serving image.",
        ) from error


def compare(endpoint: str, expected: list[int], answer: Answer) -> None:
    """Raise StepError showing the first difference between the evaluated and the served tokens."""
    got = answer.token_ids
    if got == expected:
        return
    pairs = zip(expected, got, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
    raise StepError(
        f"Endpoint '{endpoint}' generates other tokens than were evaluated, from token {at} on: "
        f"expected {expected}, got {got} (text {answer.text!r}).",
        "The endpoint serves other weights, another kernel, or other hardware than was evaluated: "
        "compare its log's backend and kernel hash with evaluation.json.",
    )


if __name__ == "__main__":
    run(main, arguments)
