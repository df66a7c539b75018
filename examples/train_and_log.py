"""Trains a small multi-head latent attention model and registers it in MLflow.

    python examples/train_and_log.py --registered-model-name mla-demo

Where it goes is MLflow's business: MLFLOW_TRACKING_URI names a server here, or `databricks` in a Databricks
job (for Unity Catalog also MLFLOW_REGISTRY_URI=databricks-uc and a name of three parts): see README.md.
The text is Python's own documentation, which every installation has. On two cores it takes about 40 seconds.
"""

import argparse
import hashlib
import logging
import os
import re
import sys
import tempfile
import time
from importlib import metadata, util
from pathlib import Path

# Without this, OpenMP's threads spin at every barrier, which costs far more than it saves on shared cores.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import mlflow
import pandas as pd
import torch
from mlflow.entities import Metric
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

# A Databricks job executes the compiled text of this file: there is no __file__, but the code knows its path.
sys.path.insert(0, str(Path(sys._getframe().f_code.co_filename).resolve().parent))
from tiny_mla import END, TinyConfig, TinyMla, evaluate, save_checkpoint, train

log = logging.getLogger("train_and_log")
HERE = Path(sys.path[0])
HELD_OUT_BYTES = 20_000
EVALUATION_LENGTH = 256
REPORT_STEPS = 20
PROMPT = "The assert statement "
PACKAGES = ("mlflow", "numpy", "pandas", "safetensors", "tokenizers", "torch", "transformers")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--registered-model-name", default="mla-demo")
    parser.add_argument("--experiment-name", help="default: mla-demo, /Shared/mla-demo on Databricks")
    parser.add_argument("--alias", default="champion", help="alias of the new version; empty for none")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--length", type=int, default=128, help="bytes a window")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch", "length"):  # an untrained model must not become the champion
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    if re.fullmatch(r"latest|v\d+", options.alias, re.IGNORECASE):  # MLflow says so only after the training
        parser.error(f"--alias {options.alias}: MLflow reserves it")
    return options


def documentation() -> bytes:
    """Python's language reference as plain text, one topic after the other."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()


def greedy(model: TinyMla, prompt: str, count: int) -> str:
    """`count` bytes after the prompt, the likeliest each time."""
    tokens = list(prompt.encode())
    for _ in range(count):
        with torch.inference_mode():
            token = int(model(torch.tensor([tokens]))[0, -1].argmax())
        if token == END:
            break
        tokens.append(token)
    return bytes(t for t in tokens if t < 256).decode(errors="replace")


def signature() -> ModelSignature:
    """Column "prompt" -> text. Only the parameters named here reach predict; MLflow drops others."""
    params = [
        ParamSpec("max_new_tokens", "long", 32),
        ParamSpec("temperature", "double", 0.0),
        ParamSpec("top_p", "double", 1.0),
        ParamSpec("top_k", "long", 0),
        ParamSpec("seed", "long", 0),
    ]
    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema(params),
    )


def requirements() -> list[str]:
    """Pins of what the model was made with; a local build's suffix (torch 2.13.0+cpu) is left out."""
    return [f"{name}=={metadata.version(name).split('+')[0]}" for name in PACKAGES if util.find_spec(name)]


def fit(options: argparse.Namespace, run_id: str) -> tuple[TinyMla, list[tuple[int, float]], float]:
    """Trains, logging the loss curve on the way. Returns the model, the curve and the held-out loss."""
    text = documentation()
    data = torch.tensor(list(text))
    torch.manual_seed(options.seed)
    model = TinyMla(TinyConfig())
    mlflow.log_params(
        {
            **{k: getattr(options, k) for k in ("steps", "batch", "length", "learning_rate", "seed")},
            **vars(model.config),
            "parameters": sum(p.numel() for p in model.parameters()),
            "text_bytes": len(text),
            "text_sha256": hashlib.sha256(text).hexdigest(),
            "torch": torch.__version__,
        }
    )
    curve: list[tuple[int, float]] = []
    pending: list[Metric] = []
    client = mlflow.MlflowClient()

    def on_step(step: int, loss: float, rate: float) -> None:
        curve.append((step, loss))
        now = int(time.time() * 1000)
        pending.extend((Metric("loss", loss, now, step), Metric("tokens_per_second", rate, now, step)))
        if step % REPORT_STEPS == 0 or step == options.steps - 1:
            log.info("step %d of %d: loss %.3f, %.0f tokens/s", step, options.steps, loss, rate)
            client.log_batch(run_id, metrics=pending)
            pending.clear()

    train(
        model,
        data[:-HELD_OUT_BYTES],
        steps=options.steps,
        batch=options.batch,
        length=options.length,
        learning_rate=options.learning_rate,
        seed=options.seed,
        on_step=on_step,
    )
    held_out = evaluate(model, data[-HELD_OUT_BYTES:], EVALUATION_LENGTH)
    mlflow.log_metric("held_out_loss", held_out, step=options.steps)
    return model, curve, held_out


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    on_databricks = mlflow.get_tracking_uri().startswith("databricks")
    mlflow.set_experiment(options.experiment_name or ("/Shared/mla-demo" if on_databricks else "mla-demo"))
    # Autologging knows Lightning, Keras and others, but no plain torch loop: fit() logs that itself. It is
    # set all the same because Databricks has it on in notebooks: a trainer in this loop's place would get a
    # second model logged, a pickle, which the pipeline refuses. Automatic here is the machine's load.
    mlflow.autolog(log_models=False, silent=True)
    with (
        mlflow.start_run(run_name="train-mla-demo", log_system_metrics=True) as run,
        tempfile.TemporaryDirectory() as scratch,
    ):
        started = time.monotonic()
        model, curve, held_out = fit(options, run.info.run_id)
        mlflow.log_metric("training_seconds", time.monotonic() - started)
        sample = greedy(model, PROMPT, 80)
        mlflow.log_text("step,loss\n" + "".join(f"{s},{v:.6f}\n" for s, v in curve), "loss_curve.csv")
        mlflow.log_text(sample, "sample.txt")
        checkpoint = Path(scratch) / "checkpoint"  # the folder's name is kept under artifacts/
        save_checkpoint(model, checkpoint)
        text = Path(scratch) / "evaluation.txt"  # a release is judged by it, beside the version in production
        text.write_text(documentation()[-HELD_OUT_BYTES:].decode(errors="ignore"), encoding="utf-8")
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(HERE / "mla_pyfunc.py"),
            artifacts={"checkpoint": str(checkpoint), "evaluation": str(text)},
            signature=signature(),
            input_example=(pd.DataFrame({"prompt": [PROMPT]}), {"max_new_tokens": 16}),
            pip_requirements=requirements(),
            registered_model_name=options.registered_model_name,
        )
    version = info.registered_model_version
    if options.alias:
        mlflow.MlflowClient().set_registered_model_alias(
            options.registered_model_name, options.alias, version
        )
    alias = f" with alias {options.alias}" if options.alias else ""
    log.info("held-out loss %.3f nats a byte (uniform: 5.545); sample: %r", held_out, sample)
    log.info(
        "registered %s version %s%s from run %s",
        options.registered_model_name,
        version,
        alias,
        run.info.run_id,
    )


if __name__ == "__main__":
    main()  # no sys.exit(): a Databricks job may take SystemExit, even 0, for a failure
