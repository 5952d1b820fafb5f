"""What a request may hand to a chat template: tools, and the keyword arguments on a list.

Knows the text of templates and which names it reads. Does not know tokenizers or messages, and renders nothing.
A template runs in a sandbox, but it is the model's code and not the server's: only names from the list reach it, and
only those that it reads, since what has no effect is refused rather than ignored.
"""

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from minisgl.errors import MinisglError, RequestError

_FLAG = (bool, "true or false")
# Accepted types, and these in words.
TEMPLATE_KWARGS: dict[str, tuple[type, str]] = {
    "add_generation_prompt": _FLAG,
    "continue_final_message": _FLAG,
    "enable_thinking": _FLAG,  # Qwen3
    "thinking": _FLAG,  # DeepSeek V3.1, Granite, Hermes 4
    "preserve_thinking": _FLAG,  # Qwen3.6
    "thinking_budget": (int, "a number of tokens"),  # Seed-OSS
    "reasoning_effort": (str, 'a string such as "low"'),
    "documents": (list, "a list of objects such as those with title and text"),
    "date_string": (str, 'a date such as "26 Jul 2024"'),  # Llama 3: today's date makes answers differ from day to day
    "tools_in_user_message": _FLAG,  # Llama 3
}
ALWAYS = ("add_generation_prompt", "continue_final_message")  # transformers' own, whatever the template reads
# transformers' own tag around what the assistant said; Jinja alone cannot parse it
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def names_read(template: str) -> frozenset[str]:
    """The variables that a template reads. MinisglError when it is none."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(_GENERATION_TAG.sub("", template))))
    except TemplateSyntaxError as error:
        raise MinisglError(f"the chat template is none: line {error.lineno}: {error.message}") from error


def check_template_kwargs(kwargs: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """The arguments for a template that reads `names`, without those that are None; RequestError names a wrong one."""
    if not isinstance(kwargs, Mapping):
        _refuse('chat_template_kwargs must be an object such as {"enable_thinking": false}')
    accepted = [name for name in TEMPLATE_KWARGS if name in names or name in ALWAYS]
    checked: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name not in TEMPLATE_KWARGS:
            _refuse(f"unknown chat template argument {name!r}; this model's template takes: {', '.join(accepted)}")
        if value is None:
            continue
        if name not in accepted:
            _refuse(f"this model's chat template does not read {name}; it takes: {', '.join(accepted)}")
        type_, words = TEMPLATE_KWARGS[name]
        if not isinstance(value, type_) or (isinstance(value, bool) and type_ is not bool):
            _refuse(f"chat template argument {name} must be {words}, not {value!r}")
        checked[name] = value
    if not all(isinstance(document, Mapping) for document in checked.get("documents", ())):
        _refuse(f"chat template argument documents must be {TEMPLATE_KWARGS['documents'][1]}")
    if checked.get("continue_final_message") and checked.get("add_generation_prompt"):
        _refuse("continue_final_message and add_generation_prompt exclude each other: leave one of them out")
    return checked


def _refuse(message: str) -> NoReturn:
    raise RequestError(message, "invalid_parameter")
