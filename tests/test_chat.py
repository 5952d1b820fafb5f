"""Conversations through the whole engine: tools, forced calls, grammars beside thinking."""

import json

import pytest

from minisgl import LLM, SamplingParams
from minisgl.structured import ResponseFormat
from tests.tiny_models import make

TEMPLATE = """{%- for tool in tools or [] %}{{ tool.function.name }} <tool_call>\n{%- endfor %}
{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant\n
{%- if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{%- endif %}{%- endif %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
HELLO = [{"role": "user", "content": "the inn"}]
ONE_CALL = {
    "tools": [WEATHER],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "template_kwargs": {"enable_thinking": False},
}
SAMPLED = SamplingParams(temperature=1.0, seed=1, max_tokens=120)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    pytest.importorskip("llguidance")
    folder = make("qwen3", tmp_path_factory.mktemp("qwen3"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with LLM(folder, device="cpu", dtype="float32", page_size=16, max_running=4, max_step_tokens=64) as llm:
        yield llm


def test_a_forced_call_is_one(llm):
    [result] = llm.chat(HELLO, SAMPLED, **ONE_CALL)
    assert result.finish_reason == "stop" and result.text == "" and result.reasoning == ""
    [call] = result.tool_calls
    assert call.name == "weather" and json.loads(call.arguments)["city"] in ("Rome", "Oslo")


def test_a_call_by_name(llm):
    named = {"type": "function", "function": {"name": "weather"}}
    [result] = llm.chat(HELLO, SAMPLED, **ONE_CALL | {"tool_choice": named})
    assert [call.name for call in result.tool_calls] == ["weather"]


def test_a_grammar_holds_where_no_one_token_ends_thinking(llm):
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=60, response_format=ResponseFormat(regex="[ab]{4}"))
    for kwargs in ({}, {"enable_thinking": False}):
        [result] = llm.chat(HELLO, params, template_kwargs=kwargs)
        assert set(result.text) <= {"a", "b"} and len(result.text) == 4 and result.reasoning == ""


def test_what_is_wrong_with_tools_is_an_error_result(llm):
    [result] = llm.chat(HELLO, SAMPLED, tools=[{"type": "function"}])
    assert result.finish_reason == "error" and "tools" in str(result.error)
    [both] = llm.chat(
        HELLO,
        SamplingParams(response_format=ResponseFormat(choice=["x"])),
        tools=[WEATHER],
        tool_choice="required",
    )
    assert "exclude" in str(both.error)


def test_answers_with_several_choices_are_each_read(llm):
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=120, n=2)
    [result] = llm.chat(HELLO, params, **ONE_CALL)
    assert len(result.choices) == 2 and all(len(choice.tool_calls) == 1 for choice in result.choices)


def test_a_stream_ends_with_the_result_of_chat(llm):
    options = {"tools": [WEATHER], "tool_choice": "required", "template_kwargs": {"enable_thinking": False}}
    [whole] = llm.chat(HELLO, SAMPLED, **options)
    *deltas, last = llm.stream(HELLO, SAMPLED, **options)
    assert [call.arguments for call in last.result.tool_calls] == [call.arguments for call in whole.tool_calls]
    assert last.result.text == "" and "weather" in "".join(delta.text for delta in deltas), "deltas have all the text"


def test_a_conversation_has_no_echo(llm):
    [result] = llm.chat(HELLO, SamplingParams(echo=True))
    assert "echo is for prompts" in str(result.error)
