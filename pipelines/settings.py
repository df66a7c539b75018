"""An environment's configuration: config/base.yaml, overlaid by config/<env>.yaml, as one frozen object.

Mappings merge key by key, everything else is replaced. An unknown key, a missing one or a wrong type is
refused with the file, the key and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints, ValidationError, ValidationInfo

from pipelines import deployment, parameters, schedule
from pipelines.deployment import Deployment
from pipelines.errors import UserError, choose
from pipelines.layers import Layers
from pipelines.strict import Strict, Text

CONFIG = Path(__file__).resolve().parent.parent / "config"
NAME = r"^[a-zA-Z0-9](-*[a-zA-Z0-9])*$"  # SageMaker's EntityName
GROUP = r"^(arn:aws[a-z-]*:sagemaker:[a-z0-9-]+:\d{12}:model-package-group/)?[a-zA-Z0-9](-*[a-zA-Z0-9])*$"

_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s?#]+@")

ROLES = (
    "PullModel",
    "CompileKernel",
    "Evaluate",
    "SmokeTest",
    "RecordRelease",
    "VerifyPackage",
    "DeployProduction",
    "RecordPromotion",
    "endpoint",
    "events",
)

# An execution's id and a dash are appended to a pipeline's name, and SageMaker takes 63 characters.
Name = Annotated[str, StringConstraints(pattern=NAME, max_length=48)]
Group = Annotated[str, StringConstraints(pattern=GROUP)]  # a name; the ARN of another account's
Account = Annotated[str, StringConstraints(pattern=r"^\d{12}$")]
RoleArn = Annotated[str, StringConstraints(pattern=r"^arn:aws[a-z-]*:iam::\d{12}:role/.+$")]


def _no_credentials(uri: str) -> str:
    if _URL_CREDENTIALS.search(uri):
        raise ValueError("a definition is no place for credentials: store them as mlflow.secret_arn says")
    return uri


def _secret_arn(value: str) -> str:
    if not re.fullmatch(r"arn:aws[a-z-]*:secretsmanager:[a-z0-9-]+:\d{12}:secret:\S+", value):
        raise ValueError("expected the ARN of a Secrets Manager secret, never the secret itself")
    return value


Address = Annotated[str, StringConstraints(min_length=1), AfterValidator(_no_credentials)]
SecretArn = Annotated[str, AfterValidator(_secret_arn)]
Schedule = Annotated[str, AfterValidator(schedule.check)]


class Images(Strict):
    """Container images of container/Dockerfile: `job` runs the steps, `serve` runs the endpoint."""

    job: Text
    serve: Text


class Network(Strict):
    """VPC of jobs and endpoints."""

    subnets: tuple[Text, ...]
    security_group_ids: tuple[Text, ...]
    encrypt_traffic: bool = True


class Mlflow(Strict):
    """Where the models come from."""

    tracking_uri: Address
    registry_uri: Address
    host: Address | None = None
    secret_arn: SecretArn | None = None
    allow_pickled_weights: bool = False

    def variables(self) -> dict[str, str]:
        """Environment of a process that talks to MLflow: addresses and the secret's ARN, no secret."""
        variables = {
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_REGISTRY_URI": self.registry_uri,
            "DATABRICKS_HOST": self.host,
            "MLA_DATABRICKS_SECRET_ARN": self.secret_arn,
        }
        return {name: value for name, value in variables.items() if value}


class Names(Strict):
    """Names of the resources that outlive an execution.

    model_package_group: in an account that only deploys, the ARN of the releasing account's group.
    """

    release_pipeline: Name
    production_pipeline: Name
    model_package_group: Group
    approval_rule: Name


class Jobs(Strict):
    """Processing jobs."""

    control_instance_type: Text
    volume_gb: Annotated[int, Field(ge=1)]
    timeout_minutes: Annotated[int, Field(ge=1, le=7200)]


def _only_of_vllm(value: int, info: ValidationInfo) -> int:
    if value > 1 and info.data.get("engine") == "native":
        raise ValueError("the native engine uses one GPU; set endpoint.engine: vllm, or this to 1")
    return value


GpusOfVllm = Annotated[int, Field(ge=1), AfterValidator(_only_of_vllm)]


class Endpoint(Strict):
    """Staging and production endpoints."""

    startup_timeout_seconds: Annotated[int, Field(ge=60, le=3600)]
    download_timeout_seconds: Annotated[int, Field(ge=60, le=3600)]
    inference_ami: str | None = None
    kernel_delivery: Literal["data_source", "download"]  # mounted by SageMaker, or fetched by the server
    engine: Literal["native", "vllm"]  # of container/serving, or vLLM with the compiled kernel inside it
    tensor_parallel: GpusOfVllm
    pipeline_parallel: GpusOfVllm


class Cache(Strict):
    """Reuse of the CompileKernel step of an earlier execution."""

    enabled: bool
    expire_after: Annotated[str, StringConstraints(pattern=r"^P(\d+[YMWD])*(T(\d+[HMS])+)?$")]


class Triggers(Strict):
    """What starts a release without a person; times are UTC.

    schedule: a release, whether or not anything is new; `upsert` sets the rule.
    poll: a look at the alias in ModelUri, and a release of a version that it newly points to.
    webhook: the same, told by MLflow instead of asked; `bootstrap` deploys both.
    """

    schedule: Schedule | None = None
    poll: Schedule | None = None
    webhook: bool = False


class Defaults(Strict):
    """Defaults of the pipeline parameters (pipelines/parameters.py)."""

    release: Mapping[str, str | int | float]
    production: Mapping[str, str | int | float]


class Settings(Strict):
    """Everything an environment decides. `environment` is the file's name, not a key of it."""

    environment: str
    region: Annotated[str, StringConstraints(pattern=r"^[a-z]{2}(-[a-z]+)+-\d$")]
    bucket: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")]
    prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$")]
    role: RoleArn  # of the pipelines, and of whatever `roles` does not name
    roles: Mapping[str, RoleArn] = Field(default_factory=dict)  # by step name, `endpoint` or `events`
    production_account: Account | None = None  # in an account that only releases: the one that deploys
    kms_key: str | None = None
    network: Network | None = None
    images: Images
    mlflow: Mlflow
    names: Names
    jobs: Jobs
    endpoint: Endpoint
    deployment: Deployment
    cache: Cache
    triggers: Triggers
    parameters: Defaults

    def role_of(self, name: str) -> str:
        """The role of a processing step by its name, of the `endpoint`, or of the approval `events`."""
        return self.roles.get(name, self.role)

    @property
    def account(self) -> str:
        """This account's number."""
        return self.role.split(":")[4]

    @property
    def group_account(self) -> str:
        """The account whose versions are released and approved."""
        group = self.names.model_package_group
        return group.split(":")[4] if group.startswith("arn:") else self.account

    @property
    def group_name(self) -> str:
        """The model package group's name, without account."""
        return self.names.model_package_group.rsplit("/", 1)[-1]

    @property
    def releases(self) -> bool:
        """Whether the release pipeline belongs to this account."""
        return self.group_account == self.account

    @property
    def deploys(self) -> bool:
        """Whether the production pipeline belongs to this account."""
        return self.production_account in (None, self.account)

    @property
    def role_name(self) -> str:
        """The role's name, without account and path."""
        return self.role.rsplit("/", 1)[-1]

    @classmethod
    def load(
        cls, environment: str, overrides: Mapping[str, object] | None = None, folder: Path = CONFIG
    ) -> Settings:
        """Read an environment.

        overrides: dotted keys to values, applied last, e.g. {"mlflow.tracking_uri": "http://…"}.
        Raises UserError for an unknown environment or anything wrong in the files.
        """
        if environment not in (known := environments(folder)):
            raise UserError(f"no environment '{environment}'", str(folder), choose(environment, known))
        base, overlay = folder / "base.yaml", folder / f"{environment}.yaml"
        layers = Layers(base, overlay, overrides or {})
        merged = layers.merged(cls)
        try:
            settings = cls.model_validate({**merged, "environment": environment})
        except ValidationError as error:
            raise _explain(error, layers, environment) from None
        if not (settings.releases or settings.deploys):
            where = layers.origin("production_account")
            raise UserError(
                "the account neither releases nor deploys",
                where,
                "give production_account in the releasing account, the group's ARN in the other",
            )
        checked = {
            name: parameters.check_defaults(
                name, getattr(settings.parameters, name), layers.origin("parameters", name)
            )
            for name in parameters.PIPELINES
        }
        for name in settings.roles:
            if name not in ROLES:
                where = layers.origin("roles", name)
                raise UserError(f"unknown key 'roles.{name}'", where, choose(name, ROLES))
        parameters.check_staging(
            checked["release"]["StagingEndpointName"],
            checked["production"]["ProductionEndpointName"],
            layers.origin("parameters", "release", "StagingEndpointName"),
        )
        instances = int(checked["production"]["EndpointInstanceCount"])
        if found := deployment.problem(settings.deployment, instances):
            key, value, why = found
            where = layers.origin("deployment", *key.split("."))
            raise UserError(f"deployment.{key} = {value!r} does not fit", where, why)
        return settings.model_copy(update={"parameters": Defaults(**checked)})


def environments(folder: Path = CONFIG) -> list[str]:
    """Names for --env: the configuration files except the base and the account's infrastructure."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in ("base", "infrastructure"))


def _explain(error: ValidationError, layers: Layers, environment: str) -> UserError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    where = layers.origin(*path)
    if first["type"] == "missing":
        return UserError(f"key '{key}' is missing", where, f"add it to config/{environment}.yaml")
    words = first["msg"].removeprefix("Value error, ")
    value = "…" if key == "mlflow.secret_arn" else _URL_CREDENTIALS.sub("***@", repr(first["input"]))
    return UserError(f"{key} = {value} is wrong", where, words[0].lower() + words[1:])
