"""The chat template of a checkpoint: a conversation as the one text that the model was trained on."""

import json
import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

log = logging.getLogger(__name__)


class ChatTemplateError(ValueError):
    """The checkpoint's template is missing or broken, or does not take these messages."""

    param = "messages"


class Generation(Extension):
    """`{% generation %}` around what the assistant says: for training alone, the text stands as it is."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja only looks into it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A Jinja template with what transformers gives to it: the tokenizer's special tokens, `raise_exception`,
    `strftime_now`, loop controls, `{% generation %}` and a `tojson` that escapes no HTML.

    `config` is a parsed tokenizer_config.json. A template that cannot be compiled is told in the log and by
    `render`: prompts without a conversation are served nevertheless.
    """

    def __init__(self, config: Mapping[str, Any]):
        source = _default_of(config.get("chat_template"))
        self._special = dict(_special_tokens(config))
        self._template = None
        self._fault = "the checkpoint has no chat template; use a prompt instead of messages"
        if not isinstance(source, str):
            return
        # the template comes with the model, so it runs sandboxed
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            self._fault = (
                f"the checkpoint's chat template is broken in line {error.lineno} ({error.message}); "
                "use a prompt instead of messages"
            )
            log.warning("no chat: %s", self._fault)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The conversation's text, up to where the assistant answers. Raises ChatTemplateError."""
        if self._template is None:
            raise ChatTemplateError(self._fault)
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except Exception as error:  # a template is a program: these messages made it fail
            known = isinstance(error, TemplateError)
            raise ChatTemplateError(
                "the checkpoint's chat template does not take these messages: "
                f"{error if known else f'{type(error).__name__}: {error}'}"
            ) from error


def _default_of(template: Any) -> Any:
    """Of several named templates the one named "default"."""
    if not isinstance(template, list):
        return template
    named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
    return named.get("default")


def _special_tokens(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """bos_token, eos_token, ...: a text, or an object that has it as its content (DeepSeek's own files)."""
    named = ((k, v.get("content") if isinstance(v, dict) else v) for k, v in config.items())
    return [(k, v) for k, v in named if k.endswith("_token") and isinstance(v, str)]


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
