"""Batch inference with the accelerated model: the released weights and the very kernel that was measured.

    python examples/batch_inference.py --model models:/mla-demo-fast@staging --prompt "The assert statement "
    python examples/batch_inference.py --model models:/main.ml.mla_accelerated@production \\
        --input prompts.csv --output completions.jsonl

Runs wherever MLflow runs; no Spark is needed. On a Databricks cluster the same model is a Spark function:

    from batch_inference import spark_udf
    complete = spark_udf(spark, "models:/main.ml.mla_accelerated@production", max_new_tokens=64)
    spark.table("main.ml.prompts").withColumn("completion", complete("prompt"))

Each Spark worker fetches the weights once and keeps them; MLA_WEIGHTS=/Volumes/… spares even that.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model URI of the accelerated model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    source.add_argument("--input", type=Path, help="CSV with a column prompt, or text with a prompt a line")
    parser.add_argument("--output", type=Path, help="JSON lines; default standard output")
    parser.add_argument("--batch", type=positive, default=64, help="prompts a call")
    parser.add_argument("--max-new-tokens", type=positive, default=32)
    parser.add_argument("--temperature", type=float, default=0.0)
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def read_prompts(path: Path) -> list[str]:
    """The column "prompt" of a CSV file, or the lines of any other file that are not blank; both UTF-8.

    Ends the program with the row's number where a CSV row has no prompt.
    """
    table = path.suffix.lower() == ".csv"
    try:
        # utf-8-sig: Excel puts a byte order mark before the first column's name
        with path.open(newline="" if table else None, encoding="utf-8-sig") as stream:
            if not table:
                return [line.rstrip("\n") for line in stream if line.strip()]
            csv.field_size_limit(sys.maxsize)  # 128 KiB else: a prompt may be a document
            rows = csv.DictReader(stream)
            if "prompt" not in (rows.fieldnames or []):
                raise SystemExit(f"{path} has the columns {rows.fieldnames}; expected one named prompt")
            prompts = [row["prompt"] for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"cannot read {path}: {error}") from None
    if None in prompts:
        raise SystemExit(f"{path}: row {prompts.index(None) + 1} has no prompt")
    return prompts


def complete(model: Any, prompts: list[str], batch: int, params: dict[str, Any]) -> Iterator[dict[str, str]]:
    """One {"prompt", "completion"} for each prompt, in order."""
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        answers = model.predict(pd.DataFrame({"prompt": part}), params=params)
        yield from (
            {"prompt": prompt, "completion": answer} for prompt, answer in zip(part, answers, strict=True)
        )


def spark_udf(spark: Any, model_uri: str, **params: Any) -> Any:
    """The model as a Spark function of one string column; `params` as of the model's signature."""
    return mlflow.pyfunc.spark_udf(spark, model_uri, result_type="string", params=params)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    prompts = options.prompt or read_prompts(options.input)
    started = time.monotonic()
    model = mlflow.pyfunc.load_model(options.model)
    loaded = time.monotonic()
    params = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    out = options.output.open("w", encoding="utf-8") if options.output else sys.stdout
    count = 0
    for row in complete(model, prompts, options.batch, params):
        print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
        count += 1
    if options.output:
        out.close()
    seconds = time.monotonic() - loaded
    print(f"loaded in {loaded - started:.1f} s; {count} completions in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()  # no sys.exit(): a Databricks job may take SystemExit, even 0, for a failure
