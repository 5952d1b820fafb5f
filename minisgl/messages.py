"""OpenAI's chat messages -> the messages that chat templates read, checked one by one.

    https://platform.openai.com/docs/api-reference/chat/create
    https://huggingface.co/docs/transformers/chat_extras (tool_calls with arguments as objects)

Knows the forms of messages. Does not know tokenizers, templates, or whether a model can do what a message asks.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from minisgl.errors import RequestError

Message = dict[str, Any]
Messages = Sequence[Mapping[str, Any]]  # [{"role": "user", "content": "..."}, ...]
ROLES = ("system", "user", "assistant", "tool")
ALIASES = {"developer": "system"}  # what OpenAI calls the system role of its newer models


def normalize_messages(messages: Messages) -> list[Message]:
    """The messages as templates expect them; RequestError names the message and what is wrong with it.

    `content` is always a string: text parts are joined, and null beside tool calls is "". Arguments of tool calls,
    JSON text in OpenAI's form, are objects. Keys that are null are left out; others that templates may read, such as
    `name` and `reasoning_content`, stay. What this returns is returned unchanged.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        _refuse('messages must be a non-empty list such as [{"role": "user", "content": "Hello"}]')
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """These messages with the arguments of tool calls as JSON text, for the few templates that expect it."""
    return [
        {**message, "tool_calls": [_text_arguments(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _text_arguments(call: Message) -> Message:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _read_message(message: Any, place: str) -> Message:
    if not isinstance(message, Mapping):
        _refuse(f"{place} is {_kind(message)}; it must be an object with role and content")
    read: Message = {key: value for key, value in message.items() if value is not None}
    role = read.get("role")
    role = ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        _refuse(f"{place} has role {role!r}; accepted: {', '.join(ROLES)}")
    read["role"] = role
    for key, instead in (("audio", "only text is supported"), ("function_call", "use tool_calls")):
        if key in read:
            _refuse(f"{place} has {key}: {instead}")
    calls = read.pop("tool_calls", None)
    if calls:  # an empty list asks for nothing, but templates look whether the key is there
        if role != "assistant":
            _refuse(f"{place} has tool_calls; only an assistant's message can")
        read["tool_calls"] = _read_calls(calls, f"{place}.tool_calls")
    if not isinstance(read.get("tool_call_id", ""), str):
        _refuse(f"{place} has a tool_call_id that is {_kind(read['tool_call_id'])}; it must be a string")
    content = read.get("content", "" if calls else None)
    read["content"] = _read_parts(content, f"{place}.content") if isinstance(content, list) else content
    if not isinstance(read["content"], str):
        _refuse(f"{place} has content that is {_kind(content)}; it must be a string or a list of text parts")
    return read


def _read_parts(parts: list[Any], place: str) -> str:
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            _refuse(f'{place}[{index}] is no content part; a content part is {{"type": "text", "text": "..."}}')
        if part["type"] != "text":
            _refuse(f"{place}[{index}] has type {part['type']!r}; only text is supported")
        if not isinstance(part.get("text"), str):
            _refuse(f"{place}[{index}] has text that is {_kind(part.get('text'))}; it must be a string")
    return "".join(part["text"] for part in parts)


def _read_calls(calls: Any, place: str) -> list[Message]:
    if not isinstance(calls, (list, tuple)):
        _refuse(f"{place} is {_kind(calls)}; it must be a list")
    return [_read_call(call, f"{place}[{index}]") for index, call in enumerate(calls)]


def _read_call(call: Any, place: str) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        _refuse(f'{place} must be {{"id", "type": "function", "function": {{"name", "arguments"}}}}')
    if call.get("type", "function") != "function":
        _refuse(f"{place} has type {call['type']!r}; the only one is 'function'")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")  # clients send "" for a call without arguments
        except (ValueError, RecursionError) as error:
            _refuse(f"{place} has arguments that are not JSON: {error}")
    if not isinstance(arguments, Mapping):
        _refuse(f"{place} has arguments that are {_kind(arguments)}; they must be the JSON text of an object")
    return {**call, "type": "function", "function": {**function, "arguments": dict(arguments)}}


def _refuse(message: str) -> NoReturn:
    raise RequestError(message, "invalid_messages")


def _kind(value: object) -> str:
    return "missing or null" if value is None else f"a {type(value).__name__}"
