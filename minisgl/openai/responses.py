"""/v1/responses: its bodies, its objects and the events of its streams. Text in, text out.

    https://platform.openai.com/docs/api-reference/responses

Knows OpenAI's forms. Nothing is stored: a response cannot be fetched or continued by its id.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from minisgl.errors import RequestError
from minisgl.messages import normalize_messages
from minisgl.openai.bodies import LABELS, NO_PARAMS, Asked
from minisgl.openai.errors import FieldError
from minisgl.openai.fields import Fields
from minisgl.request import SamplingParams, Usage

UNANSWERED = ("n", "echo", "logprobs", "prompt_logprobs", "max_tokens", "response_format")
PARAMS = {"max_output_tokens": "max_tokens"} | {name: name for name in SamplingParams.names() if name not in UNANSWERED}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "background": (False,),
    "truncation": ("disabled",),
    "service_tier": ("auto", "default"),
    "parallel_tool_calls": (True, False),
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "include": ([],),
    "top_logprobs": (0,),
}
PART_TYPES = ("input_text", "output_text", "text")


def read_response(body: Any, defaults: SamplingParams = NO_PARAMS) -> Asked:
    """A body, as the conversation that it asks to answer. FieldError names the key that is wrong."""
    fields = Fields(body)
    model, stream = fields.take("model", str, ""), fields.take("stream", bool, False)
    params = fields.take_params(PARAMS, defaults)
    form = _read_form(Fields(fields.take("text", dict, {}), "text."))
    if form is not None:
        try:
            params = params.merge({"response_format": form})
        except RequestError as error:
            raise FieldError(str(error), "text.format", error.type) from None
    instructions, value = fields.take("instructions", str, ""), fields.take_any("input")
    items = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(items, list):
        fields.refuse("input", "must be a string or a list of messages", "invalid_messages")
    messages = [{"role": "system", "content": instructions}] if instructions else []
    messages += [_read_item(item, f"input[{index}]") for index, item in enumerate(items)]
    try:
        read = normalize_messages(messages)
    except RequestError as error:
        raise FieldError(str(error), "input", error.type) from None
    fields.end(LABELS, NEUTRAL)
    return Asked(model, params, messages=tuple(read), chat_options={"template_kwargs": {}}, stream=stream)


def _read_form(fields: Fields) -> dict[str, Any] | None:
    """text.format in the form of chat completions' response_format."""
    form = fields.take_any("format")
    fields.end(neutral={"verbosity": ("medium",)})
    if isinstance(form, Mapping) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}
    return form  # type: ignore[no-any-return]


def _read_item(item: Any, place: str) -> Any:
    """A message whose parts of text are those of chat completions."""
    if not isinstance(item, Mapping) or item.get("type", "message") != "message":
        raise FieldError(f"{place} must be a message: only text is supported", "input", "invalid_messages")
    content = item.get("content")
    if isinstance(content, list):
        texts = [isinstance(part, Mapping) and part.get("type") in PART_TYPES for part in content]
        if not all(texts):
            raise FieldError(f"{place}.content must have text parts only", "input", "invalid_messages")
        content = [{"type": "text", "text": part.get("text")} for part in content]
    return {"role": item.get("role"), "content": content}


class ResponseObject:
    """A response while it is made. `events` are those of a stream; numbers count them."""

    def __init__(self, id: str, model: str, created: int, asked: Asked) -> None:
        self._number = 0
        self._item_id = f"msg_{id}"
        self._head = {"id": f"resp_{id}", "object": "response", "created_at": created, "model": model}
        self._tail: dict[str, Any] = {
            "error": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "temperature": asked.params.temperature,
            "top_p": asked.params.top_p,
            "max_output_tokens": asked.params.max_tokens,
            "previous_response_id": None,
            "store": False,
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
        }

    def value(self, status: str, text: str = "", reasoning: str = "", usage: Usage | None = None) -> dict[str, Any]:
        """The object; with `usage` it is whole."""
        output = [] if usage is None else [self._item(status, text)]
        if reasoning:
            content = [{"type": "reasoning_text", "text": reasoning}]
            output.insert(0, {"id": f"rs_{self._item_id}", "type": "reasoning", "summary": [], "content": content})
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        counts = None if usage is None else usage_of_response(usage)
        return {
            **self._head,
            "status": status,
            "output": output,
            "usage": counts,
            "incomplete_details": cut,
            **self._tail,
        }

    def begin(self) -> Iterator[dict[str, Any]]:
        """The events before the text."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self.value("in_progress"))
        item = {**self._item("in_progress", ""), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._part("response.content_part.added", part=_text_part(""))

    def text(self, delta: str) -> dict[str, Any]:
        return self._part("response.output_text.delta", delta=delta, logprobs=[])

    def end(self, status: str, text: str, reasoning: str, usage: Usage) -> Iterator[dict[str, Any]]:
        """The events behind the text."""
        yield self._part("response.output_text.done", text=text, logprobs=[])
        yield self._part("response.content_part.done", part=_text_part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._item(status, text))
        yield self._event(f"response.{status}", response=self.value(status, text, reasoning, usage))

    def _item(self, status: str, text: str) -> dict[str, Any]:
        content = [_text_part(text)]
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, type: str, **more: Any) -> dict[str, Any]:
        return self._event(type, item_id=self._item_id, output_index=0, content_index=0, **more)

    def _event(self, type: str, **more: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": type, "sequence_number": self._number - 1, **more}


def usage_of_response(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
