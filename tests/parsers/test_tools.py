import json

import pytest

from minisgl.errors import RequestError
from minisgl.parsers import ToolCallParser, ToolRequest, forcing_grammar, read_tools


def tool(name="f", **function):
    return {"type": "function", "function": {"name": name, **function}}


NAMED = {"type": "function", "function": {"name": "g"}}
POINT = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/number"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"number": {"type": "integer"}},
}


def test_choices():
    f, g = tool(), tool("g", parameters=POINT)
    assert read_tools() == read_tools([], "auto") == ToolRequest()
    assert read_tools([f, g]) == read_tools([f, g], "auto") == ToolRequest((f, g))
    assert read_tools([f, g], "none") == ToolRequest()
    assert read_tools([f, g], "required") == ToolRequest((f, g), must_call=True)
    assert read_tools([f, g], "required", False) == ToolRequest((f, g), must_call=True, parallel=False)
    assert read_tools([f, g], NAMED) == ToolRequest((g,), must_call=True, parallel=False)
    assert read_tools([tool(description=None, parameters=None, strict=True)]).tools == (tool(strict=True),)


def test_formats():
    assert read_tools().format("qwen") == "none"
    assert read_tools([tool()]).format("qwen") == "qwen"
    assert read_tools([tool()], "required").format("qwen") == "json"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (({},), "tools is a dict; it must be a list"),
        (([tool(str(i)) for i in range(129)],), "tools has 129 entries; at most 128"),
        (([tool(), "f"],), r"tools\[1\] must be .* no other tools"),
        (([{"type": "web_search"}],), r"tools\[0\] must be .* no other tools"),
        (([{"type": "function"}],), r"tools\[0\].function must be an object"),
        (([tool(3)],), r"tools\[0\].function.name is 3; it must be 1 to 64"),
        (([tool("a b")],), r"name is 'a b'; it must be"),
        (([tool(), tool()],), r"tools\[1\] has the name of tools\[0\], 'f'"),
        (([tool(description=1)],), "function.description must be a string"),
        (([tool(strict=1)],), "function.strict must be true or false"),
        (([tool(parameters=[])],), "parameters must be a JSON schema"),
        (([tool(parameters={"type": "string"})],), "parameters must be a JSON schema"),
        (([tool(parameters={"properties": []})],), "parameters.properties must be an object"),
        (([tool(arguments={})],), r"tools\[0\].function has 'arguments'; accepted: name, description, param"),
        (([], "required"), "tool_choice is 'required', but there are no tools"),
        (([tool()], NAMED), "tool_choice names 'g', which is not in tools: f"),
        ((None, NAMED), "not in tools: there are none"),
        (([tool()], "any"), "tool_choice is 'any'; accepted: 'none', 'auto', 'required'"),
        (([tool()], {"type": "allowed_tools"}), "accepted: 'none', 'auto', 'required'"),
        (([tool()], {"type": "function", "function": {}}), "tool_choice names None"),
        (([tool()], None, "yes"), "parallel_tool_calls is 'yes'; it must be true or false"),
        (([tool()], None, 0), "parallel_tool_calls is 0; it must be true or false"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(RequestError, match=message) as caught:
        read_tools(*arguments)
    assert caught.value.type == "invalid_parameter"


def accepts(request, text):
    """Whether the grammar takes `text`, and then its end."""
    llguidance = pytest.importorskip("llguidance")
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte"), llguidance.LLMatcher.grammar_from_lark(forcing_grammar(request))
    )
    assert not matcher.is_error(), matcher.get_error()
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


@pytest.mark.parametrize(
    "calls, parallel, named",
    [
        ([("f", {})], True, False),
        ([("g", {"x": 1})], True, True),
        ([("g", {"x": 1}), ("f", {}), ("g", {"x": 2})], True, False),
        ([("f", {})] * 16, True, False),
        ([("f", {})] * 17, False, False),
        ([], False, False),
        ([("g", {"x": "1"})], False, False),
        ([("g", {})], False, False),
        ([("f", {"y": 1})], False, False),
        ([("h", {})], False, False),
    ],
)
def test_a_forced_call_is_one_that_the_parser_reads(calls, parallel, named):
    """`parallel`: the grammar accepts it; `named`: also when g is the chosen function."""
    tools = [tool(), tool("g", parameters=POINT)]
    text = json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])
    assert accepts(read_tools(tools, "required"), text) == parallel
    assert accepts(read_tools(tools, NAMED), text) == named
    assert accepts(read_tools(tools, "required", False), text) == (parallel and len(calls) == 1)
    if parallel:
        content, read = ToolCallParser("json", tools).push(text)
        assert content == "" and [(call.name, json.loads(call.arguments)) for call in read] == calls
