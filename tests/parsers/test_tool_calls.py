import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.errors import MinisglError
from minisgl.parsers import ToolCallParser, find_format

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {
                "count": {"type": "integer"},
                "text": {"type": "string"},
                "maybe": {"type": ["string", "null"]},
                "items": {"type": "array"},
                "flag": {"type": "boolean"},
            },
        },
    },
}
XML = "<tool_call>\n<function=f>\n{}</function>\n</tool_call>"


def read(format, parts, tools=()):
    """Content and (name, arguments) of an answer that came in these parts."""
    parser = ToolCallParser(format, tools)
    deltas = [*map(parser.push, parts), parser.finish()]
    calls = [call for delta in deltas for call in delta.calls]
    assert len({call.id for call in calls}) == len(calls)
    return "".join(delta.content for delta in deltas), [(call.name, json.loads(call.arguments)) for call in calls]


def call(name, key="arguments", /, **arguments):
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


@pytest.mark.parametrize(
    "format, text, content, calls",
    [
        ("qwen", f"<tool_call>\n{call('f', x=1)}\n</tool_call>", "", [("f", {"x": 1})]),
        (
            "hermes",
            f"Two.\n<tool_call>{call('f', x='</tool_call>')}</tool_call>\n<tool_call>{call('g')}</tool_call>\n",
            "Two.",
            [("f", {"x": "</tool_call>"}), ("g", {})],
        ),
        ("hermes", f"Before <tool_call>{call('f')}</tool_call> after. ", "Before after. ", [("f", {})]),
        ("hermes", f"<tool_call>{call('f')}", "", [("f", {})]),  # the end token came first
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", {"x": 1})]),
        ("llama3", call("f", "parameters", x="日"), "", [("f", {"x": "日"})]),
        ("llama3", f'\n<|python_tag|>{{"type": "function", {call("f", "parameters")[1:]}', "", [("f", {})]),
        ("llama3", f"{call('f', 'parameters')}; {call('g', 'parameters')}", "", [("f", {}), ("g", {})]),
        ("llama3", f"So: {call('f', 'parameters')}", f"So: {call('f', 'parameters')}", []),
        ("mistral", f"[TOOL_CALLS] [{call('f', x=[1])}, {call('g')}]", "", [("f", {"x": [1]}), ("g", {})]),
        ("mistral", "Hi.[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g{}", "Hi.", [("f", {}), ("g", {})]),
        ("mistral", "[TOOL_CALLS]get_x[CALL_ID]a1b2c3d4e[ARGS]{}", "", [("get_x", {})]),
        ("json", f"[{call('f')}, {call('f')}]", "", [("f", {}), ("f", {})]),
        ("qwen", XML.format("<parameter=text>\n1\n\n</parameter>\n"), "", [("f", {"text": "1\n"})]),
        ("qwen", XML.format("<parameter=count>\n12\n</parameter>"), "", [("f", {"count": 12})]),
        ("qwen", XML.format("<parameter=count>many</parameter>"), "", [("f", {"count": "many"})]),
        ("qwen", XML.format("<parameter=maybe>null</parameter>"), "", [("f", {"maybe": None})]),
        ("qwen", XML.format("<parameter=items>[1]</parameter>"), "", [("f", {"items": [1]})]),
        ("qwen", XML.format("<parameter=flag>\nTrue\n</parameter>"), "", [("f", {"flag": True})]),
        ("qwen", XML.format("<parameter=other>\n12\n</parameter>"), "", [("f", {"other": "12"})]),
        ("qwen", XML.format(""), "", [("f", {})]),
        ("none", f"<tool_call>{call('f')}</tool_call>", f"<tool_call>{call('f')}</tool_call>", []),
    ],
)
def test_calls(format, text, content, calls):
    assert read(format, [text], [TOOL]) == (content, calls)
    assert read(format, text, [TOOL]) == (content, calls)


@pytest.mark.parametrize(
    "format, text",
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call> sorry'),
        ("hermes", '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "x"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}, "parameters": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "cut by max_tok'),
        ("hermes", f"<tool_call>{'{' * 5000}"),
        ("hermes", f'<tool_call>{{"name": {"[" * 5000}{"]" * 5000}}}'),
        ("hermes", "a tag: <tool_call>, and text"),
        ("hermes", "half a tag: <tool_"),
        ("qwen", "<tool_call><function=f><parameter=x>1</parameter>oops</function></tool_call>"),
        ("qwen", "<tool_call><function=f><parameter=x>1"),
        ("llama3", '{"name": "Ada", "age": 36}'),
        ("llama3", '{"name": "Ada"}'),
        ("llama3", "{}"),
        ("llama3", '<|python_tag|>brave_search.call(query="x")'),
        ("mistral", '[TOOL_CALLS] [{"name": "f"'),
        ("mistral", "[TOOL_CALLS] what?"),
        ("mistral", "[TOOL_CALLS]f[ARGS][1]"),
        ("mistral", f"[TOOL_CALLS]{'f' * 65}[ARGS]{{}}"),
        ("qwen", f"<tool_call><function={'f' * 65}></function></tool_call>"),
    ],
)
def test_what_is_no_call_is_content(format, text):
    assert read(format, [text]) == (text, [])
    assert read(format, text) == (text, [])


def test_a_malformed_call_does_not_hide_the_next():
    text = f"<tool_call>{{bad}}</tool_call><tool_call>{call('f')}</tool_call>"
    assert read("hermes", [text]) == ("<tool_call>{bad}</tool_call>", [("f", {})])
    assert read("llama3", [f"{call('f', 'parameters')}; {{1}}"]) == ("; {1}", [("f", {})])
    assert read("mistral", [f"[TOOL_CALLS] [{call('f')}, {{1}}]"]) == (", {1}]", [("f", {})])


PARTS = {
    "hermes": ["<tool_call>", "</tool_call>", call("f", x='a\\"}{'), '{"name": "g"}', "<tool_", "{", "}"],
    "qwen": ["<tool_call>", "<function=f>", "<parameter=x>", "</parameter>", "</function>", "</tool_call>", "<", ">"],
    "llama3": ["<|python_tag|>", call("f", "parameters"), ";", "; ", "{", '{"a": 1}', '"name"', "}"],
    "mistral": ["[TOOL_CALLS]", "[", "]", call("f"), ", ", "name", "[ARGS]", "[CALL_ID]x", "{}", '{"a": "["}', "{"],
    "json": ["[", call("f", x=1), ", ", "]", "{", "}"],
}


@pytest.mark.parametrize("format", PARTS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_pieces_of_any_text(format, data):
    parts = data.draw(st.lists(st.sampled_from([*PARTS[format], " ", "\n", "a"]), max_size=14))
    text = "".join(parts)
    whole = read(format, [text])
    assert read(format, list(text)) == whole
    assert read(format, parts) == whole
    # Every character is content or belongs to a call: what is left of the text when the calls' marks are gone.
    rest = iter(text)
    assert all(char in rest for char in whole[0]), "content is the text in its order"
    if not whole[1]:
        assert whole[0] == text


@settings(max_examples=100, deadline=None)
@given(
    arguments=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    ),
    ascii_=st.booleans(),
    cuts=st.lists(st.integers(1, 40), max_size=20),
)
@pytest.mark.parametrize(
    "format, form",
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'),
        ("llama3", '{"name": "f", "parameters": %s}'),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": %s}]'),
        ("mistral", "[TOOL_CALLS]f[ARGS]%s"),
    ],
)
def test_any_arguments_come_through(format, form, arguments, ascii_, cuts):
    text = form % json.dumps(arguments, ensure_ascii=ascii_)
    parts, at = [], 0
    for size in cuts:
        parts.append(text[at : at + size])
        at += size
    assert read(format, [*parts, text[at:]]) == ("", [("f", arguments)])


def test_half_a_surrogate_pair_stays_escaped():
    parser = ToolCallParser("hermes")
    [made] = parser.push('<tool_call>{"name": "f", "arguments": {"x": "\\ud83d 日"}}').calls
    assert made.arguments.encode() and json.loads(made.arguments) == {"x": "\ud83d 日"}


def test_content_and_calls_come_as_soon_as_they_are_certain():
    parser = ToolCallParser("hermes")
    assert parser.push("Let me ") == ("Let me", ())
    assert parser.push("look <tool") == (" look", ())
    assert parser.push('_call>\n{"name": "f", "arguments": {') == ("", ())
    [made] = parser.push("}}").calls
    assert (made.name, made.arguments) == ("f", "{}")
    assert parser.push("\n</tool_call>\n") == ("", ())
    assert parser.finish() == ("", ())


def test_an_answer_in_json_is_not_held_back():
    parser = ToolCallParser("llama3")
    assert parser.push('{"city') == ("", ())
    assert parser.push('": ') == ('{"city":', ())
    assert parser.push('"Paris"') == (' "Paris"', ())


def test_long_arguments_take_linear_time():
    """10,000 pieces: a parser that begins anew with each piece would look at 500 million characters."""
    looked_at = 0
    parser = ToolCallParser("hermes")
    parser.push('<tool_call>{"name": "f", "arguments": {"x": "')
    reader = parser._reading.reader
    for _ in range(10_000):
        before = reader._at
        parser.push("ten chars ")
        looked_at += reader._at - before
    assert looked_at <= 100_000 + 100
    assert json.loads(parser.push('"}}').calls[0].arguments)["x"] == "ten chars " * 10_000


def test_ids_are_those_that_templates_accept():
    [made] = ToolCallParser("mistral").push("[TOOL_CALLS]f[ARGS]{}").calls
    assert len(made.id) == 9 and made.id.isalnum()
    [made] = ToolCallParser("json").push(f"[{call('f')}").calls
    assert made.id.startswith("call_")


def test_formats():
    assert find_format("auto", '... <tool_call>\n{"name": ...') == "qwen"
    assert find_format("auto", "... [TOOL_CALLS] ...") == "mistral"
    assert find_format("auto", "... <|python_tag|> ...") == "llama3"
    assert find_format("auto", "{{ messages }}") == "none"
    assert find_format("llama3", "") == "llama3"
    for name in ("json", "gpt"):
        with pytest.raises(MinisglError, match="not known; choose one of: auto, hermes, qwen, llama3, mistral, none"):
            find_format(name, "")
