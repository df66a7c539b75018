"""SageMaker managed MLflow: what a tracking URI that is an ARN needs, and what any other must not get.

mlflow speaks to it by the plug-in sagemaker-mlflow, which mlflow loads wherever it is installed, and which
fails at every request to any other server ("list index out of range" in the log). So the job image keeps it
in a folder of its own, which becomes importable only when the URI is an ARN.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys

from steps.job import StepError

PLUGIN_VARIABLE = "MLA_SAGEMAKER_MLFLOW"  # the folder; the job image sets it

_ARN = re.compile(r"arn:aws[a-z-]*:sagemaker:[a-z0-9-]+:\d{12}:(mlflow-tracking-server|mlflow-app)/[\w.-]+")


def is_managed(uri: str) -> bool:
    """Whether `uri` names a managed server, rightly or wrongly written."""
    return uri.startswith("arn:")


def prepare(uri: str) -> None:
    """Make the plug-in importable for `uri`, before mlflow is imported and looks for plug-ins.

    Raises:
        StepError: `uri` is another ARN, or the plug-in is nowhere.
    """
    if not _ARN.fullmatch(uri):
        raise StepError(
            f"{uri} is no ARN of a SageMaker managed MLflow server.",
            "Set mlflow.tracking_uri to arn:aws:sagemaker:REGION:ACCOUNT:mlflow-tracking-server/NAME "
            "(or mlflow-app/ID).",
        )
    folder = os.environ.get(PLUGIN_VARIABLE)
    if folder and folder not in sys.path:
        sys.path.append(folder)
    if not importlib.util.find_spec("sagemaker_mlflow"):
        raise StepError(
            f"{uri} is a SageMaker managed MLflow server, and this image lacks its plug-in.",
            "Build the job image with container/Dockerfile, or install the package sagemaker-mlflow.",
        )


def silence() -> None:
    """Keep the plug-in's complaints about a server that is not its own out of the log.

    For workstations: the SageMaker SDK installs the plug-in beside mlflow.
    """
    logging.getLogger("mlflow.tracking.request_header.registry").addFilter(_no_complaint)


def _no_complaint(record: logging.LogRecord) -> bool:
    return "list index out of range" not in record.getMessage()
