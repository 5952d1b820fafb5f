"""Tool calls and thinking through OpenAI's client. The demo model's template knows neither, so it gets another one;
what it then answers is forced by grammars."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from minisgl.demo import MODEL_PATH

from .conftest import RunningServer

openai = pytest.importorskip("openai", reason="needs the extra dev: pip install -e '.[dev]'")
pytest.importorskip("llguidance", reason="needs the extra structured")

TEMPLATE = """\
{%- if tools %}<|im_start|>system
{{ tools | tojson }} <tool_call>
{"name": "f", "arguments": {}}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}"""
QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "exact": {"type": "boolean"}},
            "required": ["a", "exact"],
            "additionalProperties": False,
        },
    },
}
FORCED: dict[str, Any] = {
    "model": "tools",
    "messages": QUESTION,
    "tools": [ADD],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 120,
    "temperature": 0,
    "frequency_penalty": 2,  # or it fills the call with spaces, which JSON allows
}


@pytest.fixture(scope="module")
def tools_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("model") / "tools"
    shutil.copytree(MODEL_PATH, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    running = RunningServer("-m", str(folder))
    yield running
    assert running.stop() == 0, "".join(running.log)


@pytest.fixture
def ai(tools_server: RunningServer) -> Any:
    return openai.OpenAI(base_url=f"{tools_server.url}/v1", api_key="none", max_retries=0)


def test_a_forced_call(ai: Any) -> None:
    choice = ai.chat.completions.create(**FORCED).choices[0]
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.type == "function" and call.function.name == "add" and call.id
    assert set(json.loads(call.function.arguments)) == {"a", "exact"}
    history = [*QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    assert ai.chat.completions.create(**{**FORCED, "messages": history, "tool_choice": "none"}).choices


def test_a_streamed_call_says_the_same(ai: Any) -> None:
    whole = ai.chat.completions.create(**FORCED).choices[0].message.tool_calls[0].function
    names, arguments, reasons = "", "", []
    for chunk in ai.chat.completions.create(**FORCED, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.index == 0
            names += call.function.name or ""
            arguments += call.function.arguments or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert (names, arguments, reasons[-1]) == (whole.name, whole.arguments, "tool_calls")


@pytest.mark.parametrize("stream", [True, False])
def test_thinking_comes_apart(ai: Any, stream: bool) -> None:
    body = {"chat_template_kwargs": {"enable_thinking": True}}
    form = {"type": "regex", "regex": "two and three</think>(five|six)"}
    asked = {"model": "tools", "messages": QUESTION, "extra_body": {**body, "response_format": form}}
    if stream:
        deltas = [chunk.choices[0].delta for chunk in ai.chat.completions.create(**asked, stream=True)]
        thinking = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        content = "".join(delta.content or "" for delta in deltas)
    else:
        message = ai.chat.completions.create(**asked).choices[0].message
        thinking, content = message.reasoning_content, message.content
    assert thinking == "two and three" and content in ("five", "six")
