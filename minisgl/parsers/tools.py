"""What a request says of tools, checked; and the grammar by which it forces a call.

    https://platform.openai.com/docs/api-reference/chat/create (tools, tool_choice, parallel_tool_calls)

Knows OpenAI's forms. Does not know templates or how a model writes calls by itself.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from minisgl.errors import RequestError

Tool = dict[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}
MAX_TOOLS = 128
MAX_FORCED_CALLS = 16  # a model that is made to write calls may not come to an end
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True)
class ToolRequest:
    """tools: those the model is told of, for `Tokenizer.render`. must_call: `forcing_grammar` has to be in force.
    parallel: the answer may have several calls; if not, the caller drops those after the first."""

    tools: tuple[Tool, ...] = ()
    must_call: bool = False
    parallel: bool = True

    def format(self, model_format: str) -> str:
        """The format of ToolCallParser for this request, where the model's own is what `find_format` returned."""
        if not self.tools:
            return "none"
        return "json" if self.must_call else model_format


def read_tools(tools: Any = None, tool_choice: Any = None, parallel_tool_calls: Any = None) -> ToolRequest:
    """The three fields of a request, None where it has none; RequestError names the field that is wrong.

    tool_choice "none" leaves the tools out, and a function by name leaves out the others and forces a call, as
    "required" does. parallel_tool_calls is true unless the request says otherwise.
    """
    checked = _read_list(tools)
    names = [tool["function"]["name"] for tool in checked]
    if not isinstance(parallel_tool_calls, bool | None):
        _refuse(f"parallel_tool_calls is {parallel_tool_calls!r}; it must be true or false")
    parallel = parallel_tool_calls is not False
    if tool_choice is None or tool_choice == "auto":
        return ToolRequest(checked, parallel=parallel)
    if tool_choice == "none":
        return ToolRequest()
    if tool_choice == "required":
        if not checked:
            _refuse("tool_choice is 'required', but there are no tools")
        return ToolRequest(checked, True, parallel)
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    if not isinstance(function, Mapping) or tool_choice.get("type") != "function":
        _refuse(
            f"tool_choice is {tool_choice!r}; accepted: 'none', 'auto', 'required', "
            '{"type": "function", "function": {"name": "..."}}'
        )
    name = function.get("name")
    if name not in names:
        _refuse(f"tool_choice names {name!r}, which is not in tools: {', '.join(names) or 'there are none'}")
    return ToolRequest((checked[names.index(name)],), True, False)


def forcing_grammar(request: ToolRequest) -> str:
    """Lark text, as llguidance reads it, of a list of calls in format "json": at least one, and one if not parallel.

    [{"name": "f", "arguments": {...}}, ...], the arguments valid against the tool's schema. A schema is a document of
    its own here, so that its references hold.
    """
    assert request.tools, "a call can be forced only where there are tools"
    more = f'(", " call){{0,{MAX_FORCED_CALLS - 1}}} ' if request.parallel else ""
    lines = [f'start: "[" call {more}"]"']
    lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(request.tools))))
    for index, tool in enumerate(request.tools):
        function = tool["function"]
        opening = json.dumps(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
        schema = json.dumps(function.get("parameters") or NO_PARAMETERS)
        lines += [f'call_{index}: {opening} arguments_{index} "}}"', f"arguments_{index}: %json {schema}"]
    return "\n".join(lines) + "\n"


def _read_list(tools: Any) -> tuple[Tool, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, (list, tuple)):
        _refuse(f"tools is a {type(tools).__name__}; it must be a list")
    if len(tools) > MAX_TOOLS:
        _refuse(f"tools has {len(tools)} entries; at most {MAX_TOOLS} are allowed")
    checked = tuple(_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    names = [tool["function"]["name"] for tool in checked]
    for index, name in enumerate(names):
        if name in names[:index]:
            _refuse(f"tools[{index}] has the name of tools[{names.index(name)}], {name!r}: give it another")
    return checked


def _read_tool(tool: Any, place: str) -> Tool:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        _refuse(f'{place} must be {{"type": "function", "function": {{...}}}}; this engine has no other tools')
    function = tool.get("function")
    if not isinstance(function, Mapping):
        _refuse(f"{place}.function must be an object with name, description and parameters")
    function = {key: value for key, value in function.items() if value is not None}
    unknown = sorted(set(function) - {"name", "description", "parameters", "strict"})
    if unknown:
        _refuse(f"{place}.function has {unknown[0]!r}; accepted: name, description, parameters, strict")
    name, parameters = function.get("name"), function.get("parameters", {})
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse(f"{place}.function.name is {name!r}; it must be 1 to 64 letters, digits, '_', '-' or '.'")
    if not isinstance(function.get("description", ""), str):
        _refuse(f"{place}.function.description must be a string")
    if not isinstance(function.get("strict", False), bool):
        _refuse(f"{place}.function.strict must be true or false")
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        _refuse(f'{place}.function.parameters must be a JSON schema with "type": "object"')
    if not isinstance(parameters.get("properties", {}), Mapping):
        _refuse(f"{place}.function.parameters.properties must be an object")
    return {"type": "function", "function": function}


def _refuse(message: str) -> NoReturn:
    raise RequestError(message, "invalid_parameter")
