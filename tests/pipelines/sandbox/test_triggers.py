"""What starts a release by itself: the schedule's rule, a moved alias, MLflow's webhook, each for real.

The function's code comes from the template, webhooks from MLflow's own delivery; a stand-in answers the looks
at the paths that MLflow's client asks.
"""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines import service, triggers, upsert
from pipelines.aws import Aws as Clients
from pipelines.cli import app
from pipelines.settings import Settings
from tests.config.iam_walk import Call, statements, walk
from tests.config.recorded import calls
from tests.config.template import TRIGGERS, Stack, load
from tests.pipelines.sandbox.conftest import REGION, Aws
from tests.pipelines.sandbox.test_registry_and_events import package

SECRET = "webhook-secret"
Handler = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def clients(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> Clients:
    """Whoever reads the environment talks to the sandbox."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws.sandbox.endpoint_url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    return Clients(REGION)


@pytest.fixture
def release(aws: Aws, name: str) -> Settings:
    """A release pipeline and a package group of this test alone."""
    step = aws.script("Show", "import sys; print(sys.argv[1])", {"Get": "Parameters.ModelUri"})
    parameter = {"Name": "ModelUri", "Type": "String", "DefaultValue": "models:/main.mla.demo@champion"}
    aws.create(name, [step], [parameter])
    aws.sagemaker.create_model_package_group(ModelPackageGroupName=name)
    return Settings.load(
        "local",
        {
            "names.release_pipeline": name,
            "names.model_package_group": name,
            "parameters.release.ModelUri": "models:/main.mla.demo@champion",
        },
    )


def function(settings: Settings, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Handler:
    """The template's inline code, loaded with the variables that the template sets."""
    properties = load(TRIGGERS)["Resources"]["TriggerFunction"]["Properties"]
    given = {
        "PIPELINE": settings.names.release_pipeline,
        "GROUP": settings.names.model_package_group,
        "MODEL_NAME": "main.mla.demo",
        "MODEL_ALIAS": "champion",
        "HOST": "",
        "KIND": "mlflow",
        "REGISTRY_SECRET": "",
        "WEBHOOK_SECRET": "",
        **environment,
    }
    assert given.keys() == properties["Environment"]["Variables"].keys()
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    module: dict[str, Any] = {}
    exec(compile(properties["Code"]["ZipFile"], "index.py", "exec"), module)
    return lambda event: module["handler"](event, None)


def started(clients: Clients, settings: Settings) -> list[tuple[str, str]]:
    """Display name and ModelUri of each execution, oldest first."""
    found = clients.sagemaker.list_pipeline_executions(
        PipelineName=settings.names.release_pipeline, SortOrder="Ascending"
    )["PipelineExecutionSummaries"]
    result = []
    for one in found:
        arn = one["PipelineExecutionArn"]
        values = clients.sagemaker.list_pipeline_parameters_for_execution(PipelineExecutionArn=arn)
        uri = {each["Name"]: each["Value"] for each in values["PipelineParameters"]}.get("ModelUri", "")
        result.append((one["PipelineExecutionDisplayName"], uri))
    return result


# ---- The schedule


def test_a_schedule_is_set_changed_and_removed_and_its_rule_starts_a_release(
    aws: Aws, clients: Clients, release: Settings
) -> None:
    def configured(expression: str | None) -> list[upsert.Change]:
        settings = release.model_copy(
            update={"triggers": release.triggers.model_copy(update={"schedule": expression})}
        )
        return upsert._plan_schedule(clients, settings)

    rule = upsert.schedule_rule(release)
    assert configured(None) == []
    for expression, action in (("rate(12 hours)", "create"), ("cron(0 6 ? * MON *)", "update")):
        (change,) = configured(expression)
        assert (change.kind, change.name, change.action) == ("schedule", f"{rule}, {expression}", action)
        upsert.execute([change])
        assert [one.action for one in configured(expression)] == ["keep"]
        assert clients.events.describe_rule(Name=rule)["ScheduleExpression"] == expression
    (target,) = clients.events.list_targets_by_rule(Rule=rule)["Targets"]
    assert target["RoleArn"] == release.role_of("events")
    aws.sandbox.events.tick(rule)
    assert len(started(clients, release)) == 1
    (change,) = configured(None)
    assert change.action == "delete"
    upsert.execute([change])
    assert configured(None) == []
    with pytest.raises(LookupError):
        aws.sandbox.events.tick(rule)


# ---- A new version, the rule of it


def test_a_version_is_new_once(aws: Aws, clients: Clients, release: Settings) -> None:
    seven = triggers.Version("main.mla.demo", "7")
    assert triggers.tried(clients, release, seven) == ""
    pipeline = release.names.release_pipeline
    arns = {
        service.start(clients, pipeline, {"ModelUri": seven.uri}, seven.display_name, seven.token(pipeline))
        for _ in range(2)
    }
    assert len(arns) == 1
    assert started(clients, release) == [("main-mla-demo-v7", "models:/main.mla.demo/7")]
    assert "is" in triggers.tried(clients, release, seven)
    assert triggers.tried(clients, release, triggers.Version("main.mla.demo", "8")) == ""


def test_a_version_that_a_person_released_is_not_new(aws: Aws, clients: Clients, release: Settings) -> None:
    facts = {"MlflowModelName": "main.mla.demo", "MlflowModelVersion": "3"}
    package(aws, release.names.model_package_group, CustomerMetadataProperties=facts)
    assert triggers.tried(clients, release, triggers.Version("main.mla.demo", "3")).startswith("package 1 is")
    assert triggers.tried(clients, release, triggers.Version("other", "3")) == ""


def test_the_command_starts_a_new_version_once(
    aws: Aws, clients: Clients, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # no .mla/ of another sandbox
    local = Settings.load("local")
    step = aws.script("Show", "import sys; print(sys.argv[1])", {"Get": "Parameters.ModelUri"})
    aws.create(local.names.release_pipeline, [step], [{"Name": "ModelUri", "Type": "String"}])
    aws.sagemaker.create_model_package_group(ModelPackageGroupName=local.names.model_package_group)
    monkeypatch.setattr(triggers, "current", lambda settings: triggers.Version("mla-demo", "4"))
    first, second, wrong = (
        CliRunner().invoke(app, ["start", *more, "--if-new"])
        for more in ([], [], ["-p", "ModelUri=models:/x/1"])
    )
    assert first.output.startswith("arn:"), first.output
    assert second.output.startswith("nothing to do: models:/mla-demo/4 is not new, execution ")
    assert (second.exit_code, wrong.exit_code) == (0, 1)
    assert started(clients, local) == [("mla-demo-v4", "models:/mla-demo/4")]
    aws.wait(first.output.strip())
    aws.sagemaker.delete_pipeline(PipelineName=local.names.release_pipeline)  # the sandbox is shared
    aws.sagemaker.delete_model_package_group(ModelPackageGroupName=local.names.model_package_group)


def test_the_alias_is_asked_with_mlflows_client(
    release: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = tmp_path.as_uri()  # a folder: making a database takes MLflow 15 seconds
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # create_model_version opens the default store as well
    client = mlflow.MlflowClient(uri, uri)
    client.create_registered_model("demo")
    for _ in range(2):
        client.create_model_version("demo", source=str(tmp_path))
    client.set_registered_model_alias("demo", "champion", "2")
    given = {"mlflow.tracking_uri": uri, "mlflow.registry_uri": uri}
    settings = Settings.load("local", {**given, "parameters.release.ModelUri": "models:/demo@champion"})
    assert triggers.current(settings) == triggers.Version("demo", "2")
    lost = Settings.load("local", {**given, "parameters.release.ModelUri": "models:/demo@nobody"})
    with pytest.raises(triggers.UserError, match="nobody"):
        triggers.current(lost)


# ---- The function: the schedule's look


class Registry:
    """MLflow's and Databricks' REST answers; keeps the requests."""

    def __init__(self) -> None:
        self.version, self.asked = "1", list[tuple[str, str, bytes]]()
        outer = self

        class Front(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append((self.path, self.headers.get("Authorization", ""), body))
                known = {"access_token": "fresh"} if self.path == "/oidc/v1/token" else None
                text = json.dumps(known or {"model_version": {"version": outer.version}}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = answer

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Front)
        Thread(target=self.server.serve_forever, daemon=True).start()
        self.host = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def registry() -> Iterator[Registry]:
    one = Registry()
    yield one
    one.server.shutdown()
    one.server.server_close()


@pytest.mark.parametrize(
    ("kind", "secret", "sent"),
    [
        ("mlflow", None, [""]),
        ("mlflow", {"token": "t"}, ["Bearer t"]),
        ("mlflow", {"username": "u", "password": "p"}, [f"Basic {b64encode(b'u:p').decode()}"]),
        (
            "unity-catalog",
            {"client_id": "i", "client_secret": "s"},
            [f"Basic {b64encode(b'i:s').decode()}", "Bearer fresh"],
        ),
    ],
)
def test_a_look_starts_each_new_version_once(
    clients: Clients,
    release: Settings,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    secret: dict[str, str] | None,
    sent: list[str],
) -> None:
    arn = ""
    if secret:
        store = clients.session.client("secretsmanager")
        arn = store.create_secret(Name=release.names.release_pipeline, SecretString=json.dumps(secret))["ARN"]
    look = function(release, monkeypatch, HOST=registry.host, KIND=kind, REGISTRY_SECRET=arn)
    assert "started" in json.loads(look({"source": "aws.events"})["body"])
    assert [authorization for _, authorization, _ in registry.asked] == sent
    path = registry.asked[-1][0]
    folder = "unity-catalog/" if kind == "unity-catalog" else ""
    assert path == f"/api/2.0/mlflow/{folder}registered-models/alias?name=main.mla.demo&alias=champion"
    assert "known" in json.loads(look({"source": "aws.events"})["body"])
    registry.version = "2"
    assert "started" in json.loads(look({"source": "aws.events"})["body"])
    assert started(clients, release) == [
        ("main-mla-demo-v1", "models:/main.mla.demo/1"),
        ("main-mla-demo-v2", "models:/main.mla.demo/2"),
    ]


def test_command_and_function_follow_one_rule(
    clients: Clients, release: Settings, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    function(release, monkeypatch, HOST=registry.host)({})
    version = triggers.Version("main.mla.demo", "1")
    assert triggers.tried(clients, release, version).startswith("execution ")
    pipeline = release.names.release_pipeline
    again = service.start(
        clients, pipeline, {"ModelUri": version.uri}, version.display_name, version.token(pipeline)
    )
    assert len(started(clients, release)) == 1, again


def test_the_paths_are_those_of_mlflows_client() -> None:
    from mlflow.protos.databricks_uc_registry_messages_pb2 import GetModelVersionByAliasRequest
    from mlflow.protos.model_registry_pb2 import GetModelVersionByAlias
    from mlflow.store._unity_catalog.registry import rest_store as unity
    from mlflow.store.model_registry import rest_store as plain

    base = "/api/2.0/mlflow/"
    assert plain._METHOD_TO_INFO[GetModelVersionByAlias] == (f"{base}registered-models/alias", "GET")
    found = unity._METHOD_TO_INFO[GetModelVersionByAliasRequest]
    assert found == (f"{base}unity-catalog/registered-models/alias", "GET")


# ---- The function: webhooks


def sent_by_mlflow(
    monkeypatch: pytest.MonkeyPatch,
    secret: str = SECRET,
    event: str = "model_version_alias.created",
    **data: str,
) -> dict[str, Any]:
    """The function-URL event of a webhook that MLflow's own delivery made."""
    from mlflow.entities.webhook import Webhook, WebhookEvent
    from mlflow.webhooks import delivery

    posted: list[SimpleNamespace] = []

    class Session:
        def post(self, url: str, data: bytes, headers: dict[str, str], timeout: float) -> None:
            posted.append(SimpleNamespace(data=data, headers=headers))

    monkeypatch.setattr(delivery, "_validate_webhook_url", lambda url: None)  # it would ask a name server
    entity = WebhookEvent.from_str(event)  # type: ignore[arg-type]
    webhook = Webhook("w", "name", "https://example.com", [entity], 0, 0, secret=secret)
    payload: Any = {"name": "main.mla.demo", "alias": "champion", "version": "5", **data}
    delivery._send_webhook_request(webhook, payload, entity, Session())  # type: ignore[arg-type]
    (one,) = posted
    return {
        "requestContext": {"http": {"method": "POST"}},
        "headers": {key.lower(): value for key, value in one.headers.items()},
        "body": b64encode(one.data).decode(),
        "isBase64Encoded": True,
    }


@pytest.fixture
def hook(clients: Clients, release: Settings, monkeypatch: pytest.MonkeyPatch) -> Handler:
    store = clients.session.client("secretsmanager")
    secret = store.create_secret(Name=release.names.release_pipeline, SecretString=SECRET)["ARN"]
    return function(release, monkeypatch, WEBHOOK_SECRET=secret)


def test_a_signed_webhook_starts_a_release_and_its_copy_none(
    clients: Clients, release: Settings, hook: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = sent_by_mlflow(monkeypatch)
    first, second = hook(event), hook(event)
    assert (first["statusCode"], second["statusCode"]) == (200, 200)
    assert json.loads(first["body"])["started"] == json.loads(second["body"])["known"]
    assert started(clients, release) == [("main-mla-demo-v5", "models:/main.mla.demo/5")]


def test_text_bodies_are_taken_as_well(hook: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    from base64 import b64decode

    event = sent_by_mlflow(monkeypatch)
    event |= {"body": b64decode(event["body"]).decode(), "isBase64Encoded": False}
    assert "started" in hook(event)["body"]


BAD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no signature": lambda event: event["headers"].pop("x-mlflow-signature"),
    "another delivery": lambda event: event["headers"].update({"x-mlflow-delivery-id": "other"}),
    "another body": lambda event: event.update(body=b64encode(b'{"entity": "x"}').decode()),
    "a later time": lambda event: event["headers"].update({"x-mlflow-timestamp": str(int(time.time()) + 5)}),
    "an old time": lambda event: event["headers"].update({"x-mlflow-timestamp": str(int(time.time()) - 301)}),
    "no time": lambda event: event["headers"].pop("x-mlflow-timestamp"),
    "time that is none": lambda event: event["headers"].update({"x-mlflow-timestamp": "²"}),
    "signature outside ASCII": lambda event: event["headers"].update({"x-mlflow-signature": "v1,é"}),
    "nothing": lambda event: (event.pop("headers"), event.pop("body")),
}


@pytest.mark.parametrize("case", BAD)
def test_what_mlflow_did_not_sign_is_refused(
    clients: Clients, release: Settings, hook: Handler, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    event = sent_by_mlflow(monkeypatch)
    BAD[case](event)
    assert hook(event)["statusCode"] == 401
    assert started(clients, release) == []


def test_another_secret_is_refused(hook: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hook(sent_by_mlflow(monkeypatch, "other"))["statusCode"] == 401


def test_an_old_copy_is_refused_though_it_is_signed(hook: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    event = sent_by_mlflow(monkeypatch)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 301)
    assert hook(event)["statusCode"] == 401


@pytest.mark.parametrize(
    ("event", "data", "status"),
    [
        ("model_version_alias.created", {"alias": "other"}, 200),
        ("model_version_alias.created", {"name": "other"}, 200),
        ("model_version.created", {}, 200),
        ("model_version_alias.deleted", {}, 200),
        ("model_version_alias.created", {"version": "5; drop"}, 400),
    ],
)
def test_signed_events_that_release_nothing(
    clients: Clients,
    release: Settings,
    hook: Handler,
    monkeypatch: pytest.MonkeyPatch,
    event: str,
    data: dict[str, str],
    status: int,
) -> None:
    assert hook(sent_by_mlflow(monkeypatch, SECRET, event, **data))["statusCode"] == status
    assert started(clients, release) == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', b'{"data": []}', b'{"data": {"name": 1}}', b"\xff"]
)
def test_signed_nonsense_is_refused(hook: Handler, body: bytes) -> None:
    import hashlib
    import hmac

    sent = str(int(time.time()))
    digest = hmac.digest(SECRET.encode(), f"id.{sent}.".encode() + body, hashlib.sha256)
    headers = {
        "x-mlflow-delivery-id": "id",
        "x-mlflow-timestamp": sent,
        "x-mlflow-signature": f"v1,{b64encode(digest).decode()}",
    }
    encoded = b64encode(body).decode()
    event = {"requestContext": {}, "headers": headers, "body": encoded, "isBase64Encoded": True}
    assert hook(event)["statusCode"] == 400


# ---- The function's role


def test_its_role_allows_what_it_calls_and_nothing_else() -> None:
    registry = "arn:aws:secretsmanager:us-east-1:111122223333:secret:mla/databricks-AbCdEf"
    stack = Stack(
        load(TRIGGERS),
        {"PollSchedule": "rate(1 hour)", "WebhookEnabled": "true", "DatabricksSecretArn": registry},
    )
    arn = "arn:aws:sagemaker:us-east-1:111122223333:"
    asked = [
        *calls("trigger", "secretsmanager", "GetSecretValue", {"SecretId": registry}),
        *calls(
            "trigger",
            "secretsmanager",
            "GetSecretValue",
            {"SecretId": stack.resolve({"Ref": "WebhookSecret"})},
        ),
        *calls("trigger", "sagemaker", "StartPipelineExecution", {"PipelineName": "mla-release"}),
        Call("trigger", "sagemaker", "ListPipelineExecutions", f"{arn}pipeline/mla-release"),
        Call("trigger", "sagemaker", "ListModelPackages", f"{arn}model-package/mla-models/*"),
        Call("trigger", "sagemaker", "DescribeModelPackage", f"{arn}model-package/mla-models/4"),
    ]
    report = walk(asked, stack)
    assert (report.denied, report.unused) == ((), ())
    quiet = {one.sid for one in statements(Stack(load(TRIGGERS)), "TriggerRole")}
    assert quiet == {"ServiceWritesLogs", "StartRelease", "ReadReleased"}
