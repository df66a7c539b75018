"""Run a step's main in this process, on a folder that stands for /opt/ml."""

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from steps.job import Job


class StepRun:
    """Inputs of one step, and its outputs after `start`."""

    def __init__(self, step: ModuleType, root: Path) -> None:
        self.step, self.root = step, root

    def give(self, channel: str, file: str, document: Any) -> "StepRun":
        path = self.root / "processing" / "input" / channel / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
        return self

    def start(self, **options: object) -> "StepRun":
        parser = argparse.ArgumentParser(exit_on_error=False)
        self.step.arguments(parser)
        argv = [str(part) for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
        job = Job(self.step.__name__.rpartition(".")[2], parser.parse_args(argv), root=self.root)
        self.step.main(job)
        job.publish()
        return self

    def json(self, output: str, file: str) -> Any:
        return json.loads((self.root / "processing" / "output" / output / file).read_text())
