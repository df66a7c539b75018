"""Steps through the SageMaker Python SDK v3, with what it takes to make its output clean and deterministic.

Each workaround, and why:
- `session`: a region must be set before the SDK is imported (NoRegionError at import), a bucket must be given
  (else it calls the real STS even under AWS_ENDPOINT_URL), and telemetry must be switched off (else create
  and start report home).
- `Builder.job` uses the plain Processor: ScriptProcessor uploads code to S3 while it renders.
- `Builder.register` calls the request builder under a holder of model step arguments: ModelBuilder.register()
  adds SAGEMAKER_PROGRAM and its like to the container, ModelPackage.create() of core.resources calls AWS.
- `CanonicalPipeline`: the SDK orders dependencies by set iteration, which differs from process to process.
- `ProcessingStep` makes a whole client of the local mode, 0.3 s, to read the name of one of its methods; the
  class has the method as well.
- `SageMakerConfig` checks the whole configuration against its schema at each of some ninety look-ups while
  rendering, 0.1 s each; ours is a constant that the session checks once.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipelines import parameters
from pipelines.settings import Settings

os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")  # only for the import; sessions name their region
warnings.filterwarnings("ignore", message="Running within a PipelineSession")
for noisy in ("sagemaker", "sagemaker.core", "sagemaker.mlops", "sagemaker.config"):
    logging.getLogger(noisy).setLevel(logging.ERROR)
# The SDK calls logging.basicConfig(INFO) on import; a root logger that has a handler is left alone.
_placeholder = logging.NullHandler()
logging.getLogger().addHandler(_placeholder)

import boto3  # noqa: E402
from sagemaker.core.config.config_manager import SageMakerConfig  # noqa: E402
from sagemaker.core.local.local_session import LocalSagemakerClient  # noqa: E402
from sagemaker.core.model_registry import create_model_package_from_containers  # noqa: E402
from sagemaker.core.network import NetworkConfig  # noqa: E402
from sagemaker.core.processing import Processor  # noqa: E402
from sagemaker.core.shapes import (  # noqa: E402
    ProcessingInput,
    ProcessingOutput,
    ProcessingS3Input,
    ProcessingS3Output,
)
from sagemaker.core.workflow.conditions import (  # noqa: E402
    ConditionEquals,
    ConditionGreaterThanOrEqualTo,
    ConditionLessThanOrEqualTo,
    ConditionNot,
)
from sagemaker.core.workflow.execution_variables import ExecutionVariables  # noqa: E402
from sagemaker.core.workflow.functions import Join, JsonGet  # noqa: E402
from sagemaker.core.workflow.parameters import (  # noqa: E402
    ParameterFloat,
    ParameterInteger,
    ParameterString,
)
from sagemaker.core.workflow.pipeline_context import PipelineSession, _ModelStepArguments  # noqa: E402
from sagemaker.core.workflow.properties import PropertyFile  # noqa: E402
from sagemaker.mlops.workflow import steps as step_module  # noqa: E402
from sagemaker.mlops.workflow.condition_step import ConditionStep  # noqa: E402
from sagemaker.mlops.workflow.endpoint_step import EndpointConfigStep, EndpointStep  # noqa: E402
from sagemaker.mlops.workflow.fail_step import FailStep  # noqa: E402
from sagemaker.mlops.workflow.model_step import ModelStep  # noqa: E402
from sagemaker.mlops.workflow.pipeline import Pipeline  # noqa: E402
from sagemaker.mlops.workflow.retry import (  # noqa: E402
    SageMakerJobExceptionTypeEnum,
    SageMakerJobStepRetryPolicy,
    StepExceptionTypeEnum,
    StepRetryPolicy,
)
from sagemaker.mlops.workflow.steps import CacheConfig, ProcessingStep  # noqa: E402

logging.getLogger().removeHandler(_placeholder)
step_module.LocalSagemakerClient = lambda: LocalSagemakerClient
SageMakerConfig.validate_sagemaker_config = staticmethod(lambda config=None: None)

if TYPE_CHECKING:
    from sagemaker.core.helper.pipeline_variable import PipelineVariable
    from sagemaker.mlops.workflow.steps import Step

QUIET = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}
CHANNELS = "/opt/ml/processing"
# Only the service's own faults are tried again; a job's failure is an answer. GPUs may be out for hours.
RETRIES = (
    StepRetryPolicy(
        exception_types=[StepExceptionTypeEnum.SERVICE_FAULT, StepExceptionTypeEnum.THROTTLING],
        interval_seconds=10,
        backoff_rate=2.0,
        max_attempts=5,
    ),
    SageMakerJobStepRetryPolicy(
        exception_types=[
            SageMakerJobExceptionTypeEnum.INTERNAL_ERROR,
            SageMakerJobExceptionTypeEnum.CAPACITY_ERROR,
        ],
        interval_seconds=60,
        backoff_rate=1.5,
        expire_after_mins=180,
    ),
)
EXECUTION_ID = ExecutionVariables.PIPELINE_EXECUTION_ID
CONDITIONS = {
    "==": ConditionEquals,
    "<=": ConditionLessThanOrEqualTo,
    ">=": ConditionGreaterThanOrEqualTo,
}


class CanonicalPipeline(Pipeline):
    """A Pipeline whose definition is the same text in every process."""

    def definition(self) -> str:
        """The definition as JSON, dependencies sorted."""
        document = json.loads(super().definition())
        _sort_dependencies(document["Steps"])
        return json.dumps(document)


def _sort_dependencies(steps: Sequence[dict[str, Any]]) -> None:
    for step in steps:
        if "DependsOn" in step:
            step["DependsOn"].sort()
        for branch in ("IfSteps", "ElseSteps"):
            _sort_dependencies(step["Arguments"].get(branch, []))


def session(settings: Settings) -> PipelineSession:
    """A session that renders without calling AWS."""
    return PipelineSession(
        boto_session=boto3.Session(region_name=settings.region),
        default_bucket=settings.bucket,
        sagemaker_config=QUIET,
    )


def text(*values: PipelineVariable | str, on: str = "") -> Join:
    """Values joined at run time; numbers become text."""
    return Join(on=on, values=list(values))


class Builder:
    """Makes the steps of one pipeline: what all steps share stands here once.

    Attributes: `settings`; `p`, the pipeline's parameters by name (`builder.p.ModelUri`).
    """

    def __init__(self, settings: Settings, pipeline: str) -> None:
        self.settings = settings
        self.session = session(settings)
        defaults = getattr(settings.parameters, pipeline)
        self.p = SimpleNamespace(
            **{one.name: _parameter(one, defaults) for one in parameters.PIPELINES[pipeline]}
        )

    def job(
        self,
        name: str,
        module: str,
        *,
        description: str,
        arguments: Mapping[str, PipelineVariable | str] | None = None,
        repeated: Mapping[str, Sequence[str]] | None = None,
        inputs: Mapping[str, PipelineVariable] | None = None,
        outputs: Sequence[str] = (),
        property_files: Mapping[str, tuple[str, str]] | None = None,
        instance_type: PipelineVariable | str | None = None,
        environment: Mapping[str, PipelineVariable | str] | None = None,
        mlflow: bool = False,
        cache: bool = False,
        depends_on: Sequence[Step] = (),
        timeout_minutes: int | None = None,
    ) -> ProcessingStep:
        """A processing job that runs `python3 -m steps.<module>` in the job image.

        arguments: option to value; pipeline variables become text.
        repeated: option to values, the option once before each.
        inputs: channel to S3 URI, under /opt/ml/processing/input/<channel>.
        outputs: folders under /opt/ml/processing/output, each to
            s3://<bucket>/<prefix>/executions/<execution>/<step>/<output>.
        property_files: name to (output, path in it), for `json_get`.
        mlflow: the job talks to MLflow; it gets the URIs and the ARN of the secret.
        timeout_minutes: instead of `jobs.timeout_minutes`.
        """
        settings = self.settings
        variables = {**(settings.mlflow.variables() if mlflow else {}), **(environment or {})}
        network = settings.network and NetworkConfig(
            subnets=list(settings.network.subnets),
            security_group_ids=list(settings.network.security_group_ids),
            encrypt_inter_container_traffic=settings.network.encrypt_traffic,
        )
        processor = Processor(
            role=settings.role_of(name),
            image_uri=settings.images.job,
            instance_count=1,
            instance_type=instance_type or settings.jobs.control_instance_type,
            entrypoint=["python3", "-m", f"steps.{module}"],
            volume_size_in_gb=settings.jobs.volume_gb,
            # The service refuses a volume key on machines with disks of their own (g5, g6e, p4d, p5), which a
            # rerun may choose; those encrypt themselves, other machines' volumes take the service's key.
            volume_kms_key=None if instance_type else settings.kms_key,
            output_kms_key=settings.kms_key,
            max_runtime_in_seconds=60 * (timeout_minutes or settings.jobs.timeout_minutes),
            env=variables or None,
            network_config=network,
            sagemaker_session=self.session,
        )
        options = [part for option, value in (arguments or {}).items() for part in (option, _as_text(value))]
        options += [
            part for option, values in (repeated or {}).items() for one in values for part in (option, one)
        ]
        step_args = processor.run(
            inputs=[_input(channel, uri) for channel, uri in (inputs or {}).items()],
            outputs=[self._output(name, output) for output in outputs],
            arguments=options or None,
        )
        caching = cache and settings.cache.enabled
        return ProcessingStep(
            name=name,
            description=description,
            step_args=step_args,
            property_files=[
                PropertyFile(name=file, output_name=output, path=path)
                for file, (output, path) in (property_files or {}).items()
            ],
            cache_config=CacheConfig(True, settings.cache.expire_after) if caching else None,
            depends_on=list(depends_on) or None,
            retry_policies=list(RETRIES),
        )

    def gate(
        self, name: str, conditions: Sequence[Any], passed: list[Step], failed: list[Step]
    ) -> ConditionStep:
        """A condition step: all conditions hold -> `passed`, else `failed`."""
        return ConditionStep(name=name, conditions=list(conditions), if_steps=passed, else_steps=failed)

    def fail(self, name: str, message: Join) -> FailStep:
        """Ends the execution as Failed with the message (1024 characters at most, `lint.py` checks)."""
        return FailStep(name=name, error_message=message)

    def register(
        self, name: str, description: str, *, depends_on: Sequence[Step] = (), **request: Any
    ) -> ModelStep:
        """CreateModelPackage; `request` as `create_model_package_from_containers` takes it."""
        holder = self._holder()
        create_model_package_from_containers(self.session, **request)
        step = ModelStep(
            name=name, step_args=holder, description=description, depends_on=list(depends_on) or None
        )
        # Only packages for the Marketplace carry it, and the service refuses it in a definition.
        holder.create_model_package_request.pop("CertifyForMarketplace", None)
        return step

    def model(self, name: str, description: str, container: dict[str, Any]) -> ModelStep:
        """CreateModel with one container; the service names the model."""
        vpc = self.settings.network and {
            "Subnets": list(self.settings.network.subnets),
            "SecurityGroupIds": list(self.settings.network.security_group_ids),
        }
        holder = self._holder()
        self.session.create_model(None, self.settings.role_of("endpoint"), container, vpc_config=vpc)
        holder.create_model_request.pop("ModelName", None)
        return ModelStep(name=name, step_args=holder, description=description)

    def endpoint_config(
        self, name: str, description: str, config_name: Join, variant: dict[str, Any]
    ) -> EndpointConfigStep:
        """CreateEndpointConfig with one variant."""
        request = self.session.create_endpoint_config(config_name, [variant], kms_key=self.settings.kms_key)
        return EndpointConfigStep(name=name, step_args=request, description=description)

    def endpoint(self, name: str, description: str, endpoint_name: Any, config_name: Any) -> EndpointStep:
        """CreateEndpoint, or UpdateEndpoint when the endpoint exists; the service chooses."""
        request = self.session.create_endpoint(endpoint_name, config_name)
        return EndpointStep(name=name, step_args=request, description=description)

    def pipeline(self, name: str, steps: list[Step]) -> CanonicalPipeline:
        """The pipeline of these steps. No experiment: the run's record is MLflow's and the package's."""
        return CanonicalPipeline(
            name=name,
            parameters=list(vars(self.p).values()),
            pipeline_experiment_config=None,
            steps=steps,
            sagemaker_session=self.session,
        )

    def _holder(self) -> _ModelStepArguments:
        """Makes the session's next model request land in the returned object instead of at AWS."""
        self.session.context = _ModelStepArguments(SimpleNamespace(sagemaker_session=self.session))
        return self.session.context

    def _output(self, step: str, output: str) -> ProcessingOutput:
        uri = text(
            "s3:/",
            self.settings.bucket,
            self.settings.prefix,
            "executions",
            EXECUTION_ID,
            step,
            output,
            on="/",
        )
        folder = f"{CHANNELS}/output/{output}"
        return ProcessingOutput(
            output_name=output,
            s3_output=ProcessingS3Output(s3_uri=uri, local_path=folder, s3_upload_mode="EndOfJob"),
        )


def different(left: PipelineVariable, right: str) -> ConditionNot:
    """The condition that two texts differ."""
    return ConditionNot(ConditionEquals(left=left, right=right))


def output_uri(step: ProcessingStep, output: str) -> PipelineVariable:
    """S3 URI of a job's output, without a trailing slash."""
    return step.properties.ProcessingOutputConfig.Outputs[output].S3Output.S3Uri


def json_get(step: ProcessingStep, property_file: str, path: str) -> JsonGet:
    """A value of a JSON file that a job wrote, read when the pipeline runs."""
    return JsonGet(step_name=step.name, property_file=property_file, json_path=path)


def _parameter(parameter: parameters.Parameter, defaults: Mapping[str, parameters.Value]) -> Any:
    kind = {"String": ParameterString, "Integer": ParameterInteger, "Float": ParameterFloat}[parameter.type]
    options = {"enum_values": list(parameter.enum)} if parameter.enum else {}
    return kind(name=parameter.name, default_value=defaults.get(parameter.name), **options)


def _as_text(value: PipelineVariable | str) -> PipelineVariable | str:
    return value if isinstance(value, str) else value.to_string()


def _input(channel: str, uri: PipelineVariable) -> ProcessingInput:
    return ProcessingInput(
        input_name=channel,
        s3_input=ProcessingS3Input(
            s3_uri=uri,
            local_path=f"{CHANNELS}/input/{channel}",
            s3_data_type="S3Prefix",
            s3_input_mode="File",
            s3_data_distribution_type="FullyReplicated",
            s3_compression_type="None",
        ),
    )
