"""What a person may write as ModelUri, and what is refused before a machine is paid for."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps.job import StepError
from steps.registry.uris import parse_model_uri

# CustomerMetadataValue as botocore has it, with the Unicode classes that Python's re lacks left to letters
METADATA = re.compile(r"[\w .:/=+\-@]{1,256}")


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("models:/my model/3", {"name": "my model", "version": "3"}),
        ("models:/Modèle 日本@champion", {"name": "Modèle 日本", "alias": "champion"}),
        ("models:/main.ml.tiny@a/", {"name": "main.ml.tiny", "alias": "a"}),
        ("runs:/ab12/my model", {"run_id": "ab12", "path": "my model"}),
        ("runs:/ab12/a/b", {"run_id": "ab12", "path": "a/b"}),
        ("models:/m-" + "0a" * 16, {"model_id": "m-" + "0a" * 16}),
    ],
)
def test_every_form(text: str, fields: dict) -> None:
    parsed = parse_model_uri(text)
    assert {key: value for key, value in vars(parsed).items() if value is not None} == {"text": text} | fields


@pytest.mark.parametrize(
    "text", ["models:/ a/3", "models:/a /3", "models:/a", "runs:/ab12", "models:/a@b c", ""]
)
def test_what_names_no_model(text: str) -> None:
    with pytest.raises(StepError, match="is no model URI"):
        parse_model_uri(text)


@pytest.mark.parametrize("text", ["models:/q'uote/1", "models:/x#y@z", "runs:/ab12/a?b", "models:/a/1\n"])
def test_what_no_model_package_could_name(text: str) -> None:
    """RegisterModel would refuse it, after the GPU has measured for an hour."""
    with pytest.raises(StepError, match="model package cannot name"):
        parse_model_uri(text)
    with pytest.raises(StepError, match="has 300 characters"):
        parse_model_uri("models:/" + "a" * 290 + "/1")


@given(st.text(max_size=40), st.sampled_from(["models:/{}/1", "models:/{}@a", "runs:/ab/{}", "{}"]))
def test_what_is_accepted_fits_a_model_package(text: str, form: str) -> None:
    try:
        parsed = parse_model_uri(form.format(text))
    except StepError:
        return
    assert all(c.isalnum() or c.isspace() or METADATA.fullmatch(c) for c in parsed.text if c.isascii())
