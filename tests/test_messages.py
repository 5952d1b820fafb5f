import pytest

from minisgl.errors import RequestError
from minisgl.messages import normalize_messages


def call(arguments='{"x": 1}', **more):
    return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}, **more}


def user(content):
    return {"role": "user", "content": content}


def test_what_templates_expect():
    messages = [
        {"role": "developer", "content": "Be brief."},
        user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call(), call("")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        {"role": "assistant", "content": "c", "reasoning_content": "r", "tool_calls": []},
    ]
    read = normalize_messages(messages)
    assert read == [
        {"role": "system", "content": "Be brief."},
        user("ab"),
        {"role": "assistant", "content": "", "tool_calls": [call({"x": 1}), call({})]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        {"role": "assistant", "content": "c", "reasoning_content": "r"},
    ]
    assert normalize_messages(read) == read
    assert messages[2]["tool_calls"][0] == call(), "the caller's messages stay as they were"


@pytest.mark.parametrize(
    "message, reason",
    [
        (user(None), "content that is missing or null; it must be a string or a list of text parts"),
        (user(3), "content that is a int"),
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), r"content\[0\] has type 'image_url'; only text"),
        (user([{"type": "text", "text": "x"}, {"type": "input_audio"}]), r"content\[1\] has type 'input_audio'"),
        (user(["x"]), r"content\[0\] is no content part"),
        (user([{"type": "text"}]), r"content\[0\] has text that is missing or null"),
        ({"role": "assistant"}, "content that is missing or null"),
        ({"role": "assistant", "tool_calls": []}, "content that is missing or null"),
        ({"role": "assistant", "tool_calls": {}, "content": None}, "content that is missing or null"),
        ({"role": "assistant", "tool_calls": "f"}, "tool_calls is a str; it must be a list"),
        ({"role": "assistant", "tool_calls": ["f"]}, r"tool_calls\[0\] must be \{"),
        ({"role": "assistant", "tool_calls": [call(), {"function": {}}]}, r"tool_calls\[1\] must be \{"),
        ({"role": "assistant", "tool_calls": [call(type="custom")]}, "has type 'custom'; the only one is 'function'"),
        ({"role": "assistant", "tool_calls": [call("{")]}, r"tool_calls\[0\] has arguments that are not JSON"),
        ({"role": "assistant", "tool_calls": [call("[" * 100_000)]}, "arguments that are not JSON"),
        ({"role": "assistant", "tool_calls": [call("[]")]}, "arguments that are a list; they must be"),
        ({"role": "assistant", "tool_calls": [call(None)]}, "arguments that are missing or null"),
        ({**user("x"), "tool_calls": [call()]}, "has tool_calls; only an assistant's message can"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "tool_call_id that is a int"),
        ({"role": "assistant", "content": "x", "function_call": {}}, "has function_call: use tool_calls"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "has audio: only text is supported"),
    ],
)
def test_refused(message, reason):
    with pytest.raises(RequestError, match=reason) as caught:
        normalize_messages([user("x"), message])
    assert "messages[1]" in str(caught.value) and caught.value.type == "invalid_messages"
