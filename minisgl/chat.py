"""Conversations: what a model's chat template makes of them, and what its answers are made of.

Knows chat templates, thinking and tool calls. Does not know the engine, nor how answers stream.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from minisgl.errors import RequestError
from minisgl.messages import Messages
from minisgl.parsers import (
    ReasoningParser,
    ToolCall,
    ToolCallParser,
    ToolRequest,
    find_format,
    find_style,
    forcing_grammar,
    read_tools,
)
from minisgl.request import Result, SamplingParams
from minisgl.structured import ResponseFormat
from minisgl.tokenizer import Tokenizer


class ChatDelta(NamedTuple):
    """What a piece of text adds to an answer."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]


class ChatReader:
    """One answer's thinking, content and tool calls, as its text comes."""

    def __init__(self, thinking: ReasoningParser, calls: ToolCallParser, parallel: bool) -> None:
        self._thinking, self._calls = thinking, calls
        self._calls_left = None if parallel else 1

    def push(self, text: str) -> ChatDelta:
        """Add the next piece; returns what later text cannot change."""
        reasoning, content = self._thinking.push(text)
        return self._delta(reasoning, *self._calls.push(content))

    def finish(self) -> ChatDelta:
        """The rest, when no more text comes."""
        reasoning, content = self._thinking.finish()
        first, last = self._calls.push(content), self._calls.finish()
        return self._delta(reasoning, first.content + last.content, first.calls + last.calls)

    def _delta(self, reasoning: str, content: str, calls: tuple[ToolCall, ...]) -> ChatDelta:
        kept = calls[: self._calls_left]
        if self._calls_left is not None:
            self._calls_left -= len(kept)
        return ChatDelta(reasoning, content, kept)


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation, ready for the engine. thinks: the answer may begin with thinking."""

    text: str
    params: SamplingParams
    wanted: ToolRequest
    thinks: bool


class ChatFormat:
    """How one model writes conversations. The parsers' names are those of `parsers.STYLES` and `parsers.FORMATS`."""

    def __init__(self, tokenizer: Tokenizer, reasoning_parser: str = "auto", tool_parser: str = "auto") -> None:
        self._tokenizer = tokenizer
        self._style = find_style(reasoning_parser, tokenizer.chat_template)
        self._format = find_format(tool_parser, tokenizer.chat_template)

    def prompt(
        self,
        messages: Messages,
        params: SamplingParams,
        *,
        tools: Any = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """The prompt of a conversation, and the parameters that its tools ask for. RequestError names what is wrong.

        tools, tool_choice, parallel_tool_calls: OpenAI's. template_kwargs: see `chat_template.TEMPLATE_KWARGS`.
        """
        if params.echo:
            raise RequestError("echo is for prompts, not for conversations: leave it out", "invalid_parameter")
        wanted = read_tools(tools, tool_choice, parallel_tool_calls)
        text = self._tokenizer.render(messages, wanted.tools or None, template_kwargs)
        if wanted.tools:  # the marks of calls are special tokens in some formats
            params = replace(params, skip_special_tokens=False)
        if wanted.must_call:
            if params.response_format:
                raise RequestError("response_format and a tool_choice that forces a call exclude each other")
            params = replace(params, response_format=ResponseFormat(grammar=forcing_grammar(wanted)))
        return ChatPrompt(text, params, wanted, ReasoningParser(self._style, text).may_think)

    def reader(self, prompt: ChatPrompt) -> ChatReader:
        """What reads one answer to the prompt."""
        wanted = prompt.wanted
        calls = ToolCallParser(wanted.format(self._format), wanted.tools)
        return ChatReader(ReasoningParser(self._style, prompt.text), calls, wanted.parallel)

    def apart(self, answer: Result, prompt: ChatPrompt) -> Result:
        """An answer to the prompt, with its thinking and tool calls apart from its text."""
        reader = self.reader(prompt)
        begun, rest = reader.push(answer.text), reader.finish()
        return replace(
            answer,
            text=begun.content + rest.content,
            reasoning=begun.reasoning + rest.reasoning,
            tool_calls=begun.tool_calls + rest.tool_calls,
        )
