"""What a chat model's answer is made of: thinking, content and tool calls, apart from its text as it streams.

Knows the text that models write. Does not know tokens or the engine, nor HTTP.

    style = find_style("auto", tokenizer.chat_template)              once for a model
    format = find_format("auto", tokenizer.chat_template)
    wanted = read_tools(tools, tool_choice, parallel_tool_calls)     once for a request
    thinking = ReasoningParser(style, rendered_prompt)               once for an answer
    calls = ToolCallParser(wanted.format(format), wanted.tools)      where `wanted` may call

What comes out of `thinking` as content goes into `calls`.
"""

from minisgl.parsers.reasoning import STYLES, Delta, ReasoningParser, find_style
from minisgl.parsers.tool_calls import ToolCall, ToolCallParser, ToolDelta
from minisgl.parsers.tool_formats import FORMATS, find_format
from minisgl.parsers.tools import ToolRequest, forcing_grammar, read_tools

__all__ = [
    "FORMATS",
    "STYLES",
    "Delta",
    "ReasoningParser",
    "ToolCall",
    "ToolCallParser",
    "ToolDelta",
    "ToolRequest",
    "find_format",
    "find_style",
    "forcing_grammar",
    "read_tools",
]
