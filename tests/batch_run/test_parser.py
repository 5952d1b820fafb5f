"""Templates, columns, system messages and OpenAI's Batch lines."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from minisgl.batch_run.answers import format_line, parse_line, relabel
from minisgl.batch_run.parser import RowParser, Template, jsonable, question_hash
from minisgl.batch_run.rows import BadRow, Head, Record, Row, RowError
from minisgl.errors import MinisglError
from minisgl.parsers import ToolCall
from minisgl.request import Result, SamplingParams, TokenLogprobs, Usage

FLAGS = SamplingParams(max_tokens=5)


def parse(value: Any, **options: Any) -> Row | BadRow:
    return RowParser(FLAGS, **options).parse(Record(3, "row 4", value))


def good(value: Any, **options: Any) -> Row:
    row = parse(value, **options)
    assert isinstance(row, Row), row
    return row


def bad(value: Any, **options: Any) -> BadRow:
    row = parse(value, **options)
    assert isinstance(row, BadRow), row
    return row


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}

# -- templates and columns --

WEATHER = {"id": "w1", "city": "Oslo", "temperature": -3.5, "text": "cold"}


def test_a_template_makes_the_prompt() -> None:
    row = good(WEATHER, template=Template("{{ city }}: {{ text | upper }}"))
    assert row.prompt == "Oslo: COLD"
    assert row.params == FLAGS, "with a template no column is a parameter"
    assert (row.head.id, row.head.columns) == ("w1", {"temperature": -3.5})


def test_a_template_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompt.jinja").write_text("Summarise: {{ text }}\n")
    assert good(WEATHER, template=Template(str(tmp_path / "prompt.jinja"))).prompt == "Summarise: cold"


def test_templates_run_in_a_sandbox() -> None:
    template = Template("{{ text.__class__.__mro__[1].__subclasses__() }}")
    assert "unsafe" in bad(WEATHER, template=template).error.message
    assert bad(b'{"text": [1]}', template=Template("{{ text.append(2) }}")).error.type == "template_failed"
    assert bad(WEATHER, template=Template("{{ 1 / 0 }}")).error.type == "template_failed"


def test_a_template_that_is_wrong() -> None:
    with pytest.raises(MinisglError, match="--template cannot be read"):
        Template("{{ text ")
    with pytest.raises(MinisglError, match="'txt'; the columns are: id, city, temperature, text"):
        parse(WEATHER, template=Template("{{ txt }}"))
    assert "'txt' is undefined" in bad(b'{"text": "x"}', template=Template("{{ txt }}")).error.message


def test_the_column_that_is_the_prompt() -> None:
    row = good(WEATHER, prompt_column="text")
    assert row.prompt == "cold" and set(row.head.columns) == {"city", "temperature"}
    messages = [{"role": "user", "content": "Hi"}]
    assert good({"chat": messages}, prompt_column="chat").messages == messages
    assert bad(WEATHER, prompt_column="temperature").error.message == "prompt must be a string, not a number"
    with pytest.raises(MinisglError, match="--prompt-column names 'txt'; the columns are"):
        parse(WEATHER, prompt_column="txt")
    assert "'txt'" in bad(b'{"text": "x"}', prompt_column="txt").error.message


def test_columns_that_a_table_has_not() -> None:
    with pytest.raises(MinisglError, match="--columns names 'town'; the columns are: id, city, temperature, text"):
        parse(WEATHER, prompt_column="text", columns=["city", "town"])
    assert good(b'{"prompt": "x", "city": 1}', columns=["city", "town"]).head.columns == {"city": 1}
    with pytest.raises(MinisglError, match="not both"):
        RowParser(FLAGS, prompt_column="a", template=Template("b"))


def test_a_table_without_a_prompt() -> None:
    with pytest.raises(MinisglError, match="--prompt-column .* the columns are: id, city, temperature, text"):
        parse(WEATHER)
    assert bad({"prompt": None, "city": "Oslo"}).error.message.startswith("the row has no prompt")


def test_lines_of_text() -> None:
    assert good("Hello").prompt == "Hello"
    assert good("Hello", template=Template("Say: {{ text }}")).prompt == "Say: Hello"


def test_columns_that_are_carried_over() -> None:
    assert good(WEATHER, prompt_column="text", columns=["city"]).head.columns == {"city": "Oslo"}
    assert good(WEATHER, prompt_column="text", columns=[]).head.columns == {}
    assert good({"prompt": "x", "temprature": 1}, columns=["temprature"]).head.columns == {"temprature": 1}


def test_columns_that_no_row_has() -> None:
    parser = RowParser(FLAGS, columns=["city", "town"])
    for value in (b'{"prompt": "x", "city": 1}', b'{"prompt": "y"}'):
        parser.parse(Record(0, "row 1", value))
    assert parser.missing_columns == {"town"}


def test_names_of_the_output_are_left_to_it() -> None:
    """Those of a table's columns too, and none replaces another."""
    columns = {"text": 1, "input_text": 2, "input_input_text": 3, "error_type": None, "cached_tokens": 5, "city": 6}
    values = json.loads(format_line(good({"prompt": "x", **columns}).head, [Result("", [], "stop", Usage())]).data)
    assert values["text"] == "" and "error_type" not in values
    names = ["input_input_input_text", "input_text", "input_input_text", "input_error_type", "input_cached_tokens"]
    assert [values[name] for name in [*names, "city"]] == [*columns.values()]


def test_a_system_message() -> None:
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Hi"}
    assert good({"prompt": "Hi"}, system="Be brief.").messages == [system, user]
    assert good({"messages": [user]}, system="Be brief.").messages == [system, user]
    own = {"role": "system", "content": "Shout."}
    assert good({"messages": [own, user]}, system="Be brief.").messages == [own, user]
    assert good({"prompt_token_ids": [1]}, system="Be brief.").messages is None
    with pytest.raises(MinisglError, match="--no-chat"):
        RowParser(FLAGS, system="Be brief.", chat=False)


def test_values_of_tables_that_json_has_no_type_for() -> None:
    import datetime

    import numpy as np

    odd = {"day": datetime.date(2024, 2, 29), "raw": b"\xff", "ids": np.arange(2), "other": 1j}
    row = good({"prompt": "x", **odd})
    values = json.loads(format_line(row.head, [Result("", [], "stop", Usage())]).data)
    assert [values[name] for name in odd] == ["2024-02-29", "/w==", [0, 1], "1j"]
    assert jsonable(datetime.time(1)) == "01:00:00"


# -- OpenAI's Batch lines --


def batch_line(url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    body = body or {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hi"}]}
    return {"custom_id": "request-1", "method": "POST", "url": url, "body": body}


def test_chat_completions() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    row = good(batch_line(model="gpt-4o", messages=messages, max_completion_tokens=9, n=2, logprobs=False, user="u"))
    assert row.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (row.params.max_tokens, row.n, row.head.id, row.head.model) == (9, 2, "request-1", "gpt-4o")
    results = [Result(text, [1, 2], "stop", Usage(10, 2, 4)) for text in ("a", "b")]
    line = format_line(row.head, results)
    values = json.loads(line.data)
    assert list(values) == ["id", "custom_id", "response", "error"]
    assert (values["custom_id"], values["error"], values["response"]["status_code"]) == ("request-1", None, 200)
    body = values["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "gpt-4o")
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a", "b"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert parse_line(line.data) == line


@pytest.mark.parametrize(("prompt", "name"), [("Hi", "prompt"), (["Hi"], "prompt"), ([1, 2], "prompt_token_ids")])
def test_completions(prompt: Any, name: str) -> None:
    row = good(batch_line("/v1/completions", prompt=prompt, max_tokens=7))
    assert getattr(row, name) == ("Hi" if name == "prompt" else [1, 2])
    body = json.loads(format_line(row.head, [Result("a", [1], "length", Usage(1, 1, 0))]).data)["response"]["body"]
    assert (body["object"], body["choices"][0]["text"]) == ("text_completion", "a")
    assert body["choices"][0]["finish_reason"] == "length"


def test_several_prompts_in_a_line() -> None:
    row = good(batch_line("/v1/completions", prompt=["Hi", [1, 2], "Ho"], n=2))
    assert (row.prompts, row.n, row.head.num_prompts) == (["Hi", [1, 2], "Ho"], 2, 3)
    results = [Result(str(place), [1], "stop", Usage(place // 2 + 5, 1, place // 2)) for place in range(6)]
    body = json.loads(format_line(row.head, results).data)["response"]["body"]
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(n, str(n)) for n in range(6)]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (5 + 6 + 7, 6)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0 + 1 + 2}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (batch_line("/v1/embeddings"), "url is '/v1/embeddings'"),
        ({**batch_line(), "method": "GET"}, "it must be POST"),
        ({**batch_line(), "custom_id": 7}, "custom_id must be a string"),
        ({**batch_line(), "body": "x"}, "the body must be a JSON object"),
        (batch_line(messages=[]), "messages must be"),
        (batch_line(model="m"), "messages must be"),
        (batch_line(messages=[{"role": "user", "content": "Hi"}], temperature=-1), "temperature is -1"),
        (batch_line(messages=[{"role": "user", "content": "Hi"}], tools=[{"type": "function"}]), "tools[0]"),
        (batch_line(messages=[{"role": "user", "content": "Hi"}], stream=True), "stream is not for files"),
        (batch_line(messages=[{"role": "user", "content": "Hi"}], top_logprobs=1), "needs logprobs: true"),
        (batch_line("/v1/completions", prompt="Hi", logprobs=1, echo=True), "ask for prompt_logprobs"),
        (batch_line("/v1/completions", prompt="Hi", tools=[]), "tools is not supported"),
        (batch_line("/v1/completions", prompt="Hi", logprobs=30), "logprobs is 30; it must be from 0 to 20"),
        (batch_line(messages=[{"role": "user", "content": "Hi"}], temprature=1), "temprature is not supported"),
        (batch_line("/v1/completions", prompt=["a", 1]), "must be a string, a list of token ids"),
        (batch_line("/v1/completions", prompt=[1, 2**64]), "has a token id that is not from 0 to"),
        (batch_line("/v1/completions", prompt=[]), "must be a string, a list of token ids"),
        (batch_line("/v1/completions", prompt=[[1], []]), "must be a string, a list of token ids"),
    ],
)
def test_refused_batch_lines_are_answered_in_kind(line: dict[str, Any], says: str) -> None:
    row = bad(json.dumps(line).encode())
    assert says in row.error.message
    answer = format_line(row.head, row.error)
    values = json.loads(answer.data)
    assert list(values) == ["id", "custom_id", "response", "error"]
    assert values["response"]["status_code"] == 400
    assert values["error"] == {"code": row.error.type, "message": row.error.message}
    assert values["response"]["body"]["error"]["message"] == row.error.message
    assert answer.failed and parse_line(answer.data) == answer


def test_a_parameter_out_of_range_is_an_invalid_one() -> None:
    for line in ({"prompt": "Hi", "logprobs": 30}, batch_line("/v1/completions", prompt="Hi", logprobs=30)):
        assert bad(json.dumps(line).encode()).error.type == "invalid_parameter"


def test_logprobs_in_their_form() -> None:
    logprobs = [TokenLogprobs(65, -0.5, ((65, -0.5), (66, -1.5))), TokenLogprobs(200, -2.0)]
    result = Result("A", [65, 200], "stop", Usage(1, 2, 0), logprobs=logprobs)

    def choice(line: dict[str, Any]) -> Any:
        row = good(line)
        assert row.params.logprobs == 2
        spelled = format_line(row.head, [result], spell=lambda token: chr(token) if token < 128 else "\ufffd")
        return json.loads(spelled.data)["response"]["body"]["choices"][0]

    chat = choice(batch_line(messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2))
    first, second = chat["logprobs"]["content"]
    assert {key: first[key] for key in ("token", "logprob", "bytes")} == {"token": "A", "logprob": -0.5, "bytes": [65]}
    assert [(other["token"], other["logprob"]) for other in first["top_logprobs"]] == [("A", -0.5), ("B", -1.5)]
    assert (second["bytes"], second["top_logprobs"]) == (None, []), "a part of a character has no bytes of its own"
    assert choice(batch_line("/v1/completions", prompt="Hi", logprobs=2))["logprobs"] == {
        "tokens": ["A", "\ufffd"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"A": -0.5, "B": -1.5}, {}],
        "text_offset": [0, 1],
    }


def test_thinking_and_tool_calls_in_their_form() -> None:
    call = ToolCall("call_1", "weather", '{"city": "Rome"}')
    result = Result("", [1], "stop", Usage(1, 1, 0), reasoning="Rome, then.", tool_calls=(call,))
    row = good(batch_line(messages=[{"role": "user", "content": "Hi"}], tools=[TOOL], tool_choice="required"))
    assert row.chat_options["tools"] == [TOOL] and row.chat_options["tool_choice"] == "required"
    [choice] = json.loads(format_line(row.head, [result]).data)["response"]["body"]["choices"]
    calls = [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "Rome, then.",
        "tool_calls": calls,
    }
    assert choice["finish_reason"] == "tool_calls"
    ours = json.loads(format_line(good({"messages": row.messages}).head, [result]).data)
    assert (ours["reasoning"], ours["tool_calls"], ours["finish_reason"]) == ("Rome, then.", calls, "stop")
    assert list(ours)[2:6] == ["text", "reasoning", "tool_calls", "finish_reason"]


def test_what_a_conversation_may_say() -> None:
    ask = {"messages": [{"role": "user", "content": "Hi"}]}
    options = {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False}
    kwargs = {"enable_thinking": False}
    assert good(ask).chat_options == {}
    row = good(ask | options | {"chat_template_kwargs": kwargs, "tool": None})
    assert row.chat_options == {**options, "template_kwargs": kwargs} and row.head.columns == {"tool": None}
    flags = {"enable_thinking": True, "date_string": "now"}
    row = good(ask | {"chat_template_kwargs": kwargs}, template_kwargs=flags)
    assert row.chat_options == {"template_kwargs": {"enable_thinking": False, "date_string": "now"}}
    assert good({"prompt": "x"}, template_kwargs=flags).chat_options == {}
    assert good({"prompt": "x", "tools": [TOOL]}, chat=True).chat_options == {"tools": [TOOL]}
    hashes = {
        question_hash(good(ask | more)) for more in ({}, options, {"chat_template_kwargs": kwargs}, {"stop": "."})
    }
    assert len(hashes) == 4, "rows that ask for something else are others"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"prompt": "x", "tools": [{"type": "function"}]}, "tools[0].function must be an object"),
        ({"prompt": "x", "tool_choice": "required"}, "there are no tools"),
        ({"prompt": "x", "chat_template_kwargs": []}, "chat_template_kwargs must be an object, not a list"),
        ({"prompt": "x", "chat_template_kwargs": {"enable_thinking": True}}, "need messages; --chat"),
        ({"prompt": "x", "response_format": {"type": "json"}}, "response_format must be an object"),
        ({"prompt": "x", "tols": []}, "did you mean 'tools'?"),
    ],
)
def test_what_it_may_not_say(more: dict[str, Any], says: str) -> None:
    assert says in bad(json.dumps(more).encode()).error.message


def test_the_answer_of_a_row_that_asks_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.0)
    results = [Result("a", [1], "stop", Usage(1, 1, 0))]
    head = Head(8, 99, "second", columns={"label": 2})
    copy = relabel(format_line(Head(3, 7, "first", columns={"label": 1}), results).data, head)
    assert copy == format_line(head, results)
    row = good(batch_line())
    second = Head(8, 99, "second", form=row.head.form, model="theirs")
    copy = relabel(format_line(row.head, results).data, second)
    assert copy == format_line(second, results)
    assert parse_line(copy.data) == copy
    failed = relabel(format_line(row.head, RowError("invalid_row", "why")).data, second)
    assert failed.failed and json.loads(failed.data)["error"]["message"] == "why"
