"""What is taken from a model's input example, and that Evaluate asks with it."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.models import Model
from mlflow.models.utils import _save_example

from container.serving.engine import Engine
from steps.evaluation import model_level
from steps.evaluation.engines import ENGINE_OPTIONS
from steps.evaluation.example import PROMPT_CHARACTERS, prompt_of
from tests.steps.tiny_model import write_model

KEYS = st.sampled_from(["prompt", "inputs", "columns", "data", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
)


@pytest.mark.parametrize(
    "example",
    [
        "own",
        ["own", "other"],
        {"prompt": "own", "max_tokens": 4, "model": "other"},
        {"prompt": ["own", "other"]},
        {"inputs": "own", "params": {"stop": "other"}},
        {"inputs": ["own"]},
        {"inputs": {"text": ["own"]}, "params": {"stop": "other"}},
        {"instances": [{"prompt": "own", "system": "other"}]},
        {"dataframe_records": [{"text": "own"}]},
        {"dataframe_split": {"columns": ["system", "prompt"], "index": [0], "data": [["other", "own"]]}},
        {"columns": ["text"], "data": [["own"], ["other"]]},
    ],
)
def test_the_prompt_is_found(example):
    assert prompt_of(example) == "own"


@pytest.mark.parametrize(
    "example",
    [
        None,
        3,
        [],
        {},
        "",
        " \n",
        "\ud800",
        [[1, 2, 3]],
        {"inputs": {"a": "x", "b": "y"}},
        {"columns": ["a", "b"], "data": [["x", "y"]]},
        {"columns": ["prompt"], "data": []},
        {"columns": ["prompt"], "data": [[]]},
        {"messages": [{"role": "user", "content": "x"}]},
    ],
)
def test_what_holds_no_single_text_gives_none(example):
    assert prompt_of(example) is None


@given(JSON)
def test_any_json_gives_a_short_text_or_none(example):
    prompt = prompt_of(example)
    if prompt is not None:
        assert prompt.strip()
        assert len(prompt) <= PROMPT_CHARACTERS
        prompt.encode()


@pytest.mark.parametrize(
    "example",
    [
        pd.DataFrame({"prompt": ["own"]}),
        (pd.DataFrame({"prompt": ["own"]}), {"stop": "other"}),
        ["own"],
        {"prompt": "own"},
        ({"prompt": "own"}, {"stop": "other"}),
        np.array(["own"]),
    ],
)
def test_the_files_that_mlflow_writes_are_read(example, tmp_path):
    model = Model()
    _save_example(model, example, str(tmp_path))
    file = tmp_path / model.saved_input_example_info["artifact_path"]
    assert prompt_of(json.loads(file.read_text())) == "own"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model"))
    return Engine.load(folder, backend="reference", options=ENGINE_OPTIONS)


def test_evaluate_asks_with_the_models_own_example(engine):
    example = {"inputs": {"columns": ["prompt"], "data": [["Once upon a time"]]}, "params": {"stop": "x"}}
    smoke = model_level.smoke(engine, example)
    assert smoke.prompt == "Once upon a time"
    [answer] = engine.generate([smoke.prompt], max_tokens=smoke.max_tokens)
    assert answer.token_ids == smoke.token_ids


def test_without_a_text_evaluate_asks_with_its_own(engine):
    for example in (None, [[1, 2]], ""):
        assert model_level.smoke(engine, example).prompt == model_level.PROMPTS[0]


def test_an_example_too_long_for_the_model_is_cut(engine):
    """The test's tokenizer has a token a byte, and the euro sign three bytes."""
    smoke = model_level.smoke(engine, {"prompt": "€" * 5000})
    assert set(smoke.prompt) == {"€"}
    assert len(smoke.prompt.encode()) + smoke.max_tokens <= engine.max_model_len
    assert len(smoke.token_ids) == smoke.max_tokens


def test_an_example_that_the_model_ends_at_once_is_not_used(engine, monkeypatch):
    generate = engine.generate

    def end_at_once(prompts, max_tokens):
        return generate(prompts, max_tokens=1 if prompts == ["The end."] else max_tokens)

    monkeypatch.setattr(engine, "generate", end_at_once)
    assert model_level.smoke(engine, "The end.").prompt == model_level.PROMPTS[0]
