"""The objects of an answer: completions, chunks of a stream, logprobs and usage.

Knows OpenAI's forms. Does not know where text comes from: whoever asks for a token's text passes `spell`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from minisgl.chat import ChatDelta, ChatReader
from minisgl.parsers import ToolCall
from minisgl.request import TokenLogprobs, Usage

Spell = Callable[[int], str]  # a token's text, special or not
Form = Literal["chat.completion", "text_completion"]
ID_PREFIXES: dict[Form, str] = {"chat.completion": "chatcmpl-", "text_completion": "cmpl-"}
INCOMPLETE = "\ufffd"


def completion(form: str, id: str, model: str, created: int, choices: list[Any], usage: Any = None) -> dict[str, Any]:
    """A whole answer, or a chunk of one: `form` names it."""
    value = {"id": id, "object": form, "created": created, "model": model, "choices": choices}
    return value if usage is None else {**value, "usage": usage}


def usage_object(usages: Sequence[Usage], num_choices: int = 1) -> dict[str, Any]:
    """Counts of all answers; those to one prompt follow one another, and its tokens count once."""
    firsts = usages[::num_choices]
    prompt = sum(usage.prompt_tokens for usage in firsts)
    output = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
    }


def read_usage(value: dict[str, Any]) -> Usage:
    """The counts in an answer of any server."""
    cached = (value.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(value["prompt_tokens"], value["completion_tokens"], cached)


def tool_call_object(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class ChatAnswer:
    """The message of one answer, as its text comes. `push` and `finish` return what they add, as the delta of a chunk;
    `message` is all of it. `begun`: what the prompt has of the message already (continue_final_message)."""

    def __init__(self, reader: ChatReader, begun: str = "", *, separate_reasoning: bool = True) -> None:
        """Without `separate_reasoning`, thinking is not kept apart from the content, but its tags are gone."""
        self._reader = reader
        self._separate = separate_reasoning
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []
        reader.push(begun)

    def push(self, text: str) -> dict[str, Any]:
        return self._add(self._reader.push(text))

    def finish(self) -> dict[str, Any]:
        """The rest, when no more text comes."""
        return self._add(self._reader.finish())

    def finish_reason(self, reason: str) -> str:
        """What an answer that ended for `reason` says."""
        return "tool_calls" if self._calls and reason == "stop" else reason

    @property
    def message(self) -> dict[str, Any]:
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message |= {"content": content or None, "tool_calls": self._calls}
        return message

    def _add(self, new: ChatDelta) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        reasoning, content = (new.reasoning, new.content) if self._separate else ("", new.reasoning + new.content)
        if reasoning:
            self._reasoning.append(reasoning)
            delta["reasoning_content"] = reasoning
        if content:
            self._content.append(content)
            delta["content"] = content
        if new.tool_calls:
            first = len(self._calls)
            objects = [tool_call_object(call) for call in new.tool_calls]
            self._calls += objects
            delta["tool_calls"] = [{"index": first + place, **call} for place, call in enumerate(objects)]
        return delta


def chat_logprobs(tokens: Iterable[TokenLogprobs], spell: Spell) -> dict[str, Any]:
    """The logprobs of a choice of a chat completion."""
    content = [
        {
            **_chat_token(token.token_id, token.logprob, spell),
            "top_logprobs": [_chat_token(other, value, spell) for other, value in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, spell: Spell) -> dict[str, Any]:
    text = spell(token_id)
    known = None if INCOMPLETE in text else list(text.encode())  # a part of a character has no text of its own
    return {"token": text, "logprob": logprob, "bytes": known}


def completion_logprobs(
    tokens: Iterable[TokenLogprobs], spell: Spell, offset: int = 0, first_id: int | None = None
) -> dict[str, Any]:
    """The logprobs of a choice of a completion. `offset`: where the first token begins in the choice's text.
    `first_id`: the first token of an echoed prompt, before all others; it has no logprob."""
    value: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(token_id: int, logprob: float | None, top: dict[str, float] | None) -> None:
        text = spell(token_id)
        place = value["text_offset"][-1] + len(value["tokens"][-1]) if value["tokens"] else offset
        for name, entry in zip(value, (text, logprob, top, place), strict=True):
            value[name].append(entry)

    if first_id is not None:
        add(first_id, None, None)
    for token in tokens:
        add(token.token_id, token.logprob, {spell(other): logprob for other, logprob in token.top})
    return value


def prompt_logprobs_object(tokens: Iterable[TokenLogprobs], spell: Spell) -> list[Any]:
    """A prompt's logprobs, for which OpenAI has no form; vLLM's: null, then of each token {id: {...}, ...}."""
    scored: list[Any] = [None]
    for token in tokens:
        entries = dict(token.top) | {token.token_id: token.logprob}
        scored.append({str(id): {"logprob": value, "decoded_token": spell(id)} for id, value in entries.items()})
    return scored
