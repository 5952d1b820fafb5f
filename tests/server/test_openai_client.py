"""OpenAI's own client works unchanged: sync, async, streams, tools, structured output, errors."""

import asyncio
import json
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="needs the extra dev: pip install -e '.[dev]'")

QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["sum"],
    "additionalProperties": False,
}


@pytest.fixture
def ai(server: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_chat_is_answered(ai: Any) -> None:
    answer = ai.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == "5"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 16
    assert answer.usage.completion_tokens == 2
    assert answer.usage.total_tokens == 18


def test_a_stream_says_what_the_whole_answer_says(ai: Any) -> None:
    asked = {"model": "demo", "messages": [{"role": "user", "content": "Please reverse the word coral."}], "seed": 3}
    whole = ai.chat.completions.create(**asked)
    chunks = list(ai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert not any(chunk.usage for chunk in chunks[:-1])


def test_every_chunk_has_its_usage_where_asked_for(ai: Any) -> None:
    options = {"continuous_usage_stats": True}
    chunks = list(
        ai.chat.completions.create(
            model="demo",
            messages=QUESTION,
            max_tokens=6,
            stream=True,
            stream_options=options,
            extra_body={"ignore_eos": True},
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert counts == sorted(counts) and counts[-1] == 6  # those past the end of text, which have no text, too
    asked = {"model": "demo", "prompt": "Once", "max_tokens": 4, "extra_body": {"ignore_eos": True}}
    chunks = list(ai.completions.create(**asked, stream=True, stream_options=options))
    assert chunks[-1].usage.completion_tokens == 4 and len({chunk.usage.prompt_tokens for chunk in chunks}) == 1


def test_async_calls_run_side_by_side(server: Any) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as ai:
            sums = [(a, b) for a in range(2, 6) for b in range(2, 6)]
            calls = [
                ai.chat.completions.create(
                    model="demo", temperature=0, messages=[{"role": "user", "content": f"What is {a} + {b}?"}]
                )
                for a, b in sums
            ]
            answers = await asyncio.gather(*calls)
            return [
                f"{a + b}={answer.choices[0].message.content}" for (a, b), answer in zip(sums, answers, strict=True)
            ]

    for equation in asyncio.run(ask()):
        wanted, got = equation.split("=")
        assert wanted == got


def test_several_answers_and_logprobs(ai: Any) -> None:
    answer = ai.chat.completions.create(
        model="demo", messages=QUESTION, n=3, seed=1, temperature=1, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        first = choice.logprobs.content[0]
        assert first.logprob <= 0
        assert len(first.top_logprobs) == 2
        assert bytes(first.bytes).decode() == first.token
    assert answer.usage.prompt_tokens == 16  # once, not for each answer


def test_streamed_answers_come_interleaved_and_whole(ai: Any) -> None:
    texts = {0: "", 1: ""}
    for chunk in ai.chat.completions.create(model="demo", messages=QUESTION, n=2, temperature=0, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "5", 1: "5"}


def test_completions_with_several_prompts(ai: Any) -> None:
    asked = {"model": "demo", "prompt": ["Once upon", "The sum"], "max_tokens": 5, "n": 2, "seed": 7}
    whole = ai.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    for chunk in ai.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_echo_has_the_logprobs_of_the_prompt(ai: Any) -> None:
    answer = ai.completions.create(model="demo", prompt="What is 2 + 3?", max_tokens=2, echo=True, logprobs=1)
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert choice.text.startswith("What is 2 + 3?")
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token) or offset >= len(choice.text)


def test_a_stop_string_ends_the_text(ai: Any) -> None:
    asked = {"model": "demo", "messages": [{"role": "user", "content": "Name the capital of Chad."}], "temperature": 0}
    whole = ai.chat.completions.create(**asked).choices[0].message.content
    cut = ai.chat.completions.create(**asked, stop=[whole[2:4]])
    assert cut.choices[0].message.content == whole[:2]
    assert cut.choices[0].finish_reason == "stop"
    assert (
        "".join(
            chunk.choices[0].delta.content or ""
            for chunk in ai.chat.completions.create(**asked, stop=[whole[2:4]], stream=True)
        )
        == whole[:2]
    )


def test_a_json_schema_holds(ai: Any) -> None:
    pytest.importorskip("llguidance", reason="needs the extra structured")
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    answer = ai.chat.completions.create(model="demo", messages=QUESTION, response_format=form, max_tokens=64)
    assert set(json.loads(answer.choices[0].message.content)) == {"sum"}
    regex = {"type": "regex", "regex": "[0-9]{3}"}
    answer = ai.chat.completions.create(model="demo", messages=QUESTION, extra_body={"response_format": regex})
    assert len(answer.choices[0].message.content) == 3


def test_a_bad_schema_is_refused_and_nothing_else(ai: Any) -> None:
    pytest.importorskip("llguidance", reason="needs the extra structured")
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError):
        ai.chat.completions.create(model="demo", messages=QUESTION, response_format=form)
    assert ai.chat.completions.create(model="demo", messages=QUESTION).choices


def test_tools_that_the_model_cannot_see_are_refused(ai: Any) -> None:
    """The demo model's template has no place for them: silence would be a lie."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError) as refused:
        ai.chat.completions.create(model="demo", messages=QUESTION, tools=[tool])
    assert refused.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as refused:
        ai.chat.completions.create(model="demo", messages=QUESTION, tools=[{"type": "search"}])
    assert refused.value.param == "tools"
    assert ai.chat.completions.create(model="demo", messages=QUESTION, tools=[tool], tool_choice="none").choices


def test_models_are_listed(ai: Any) -> None:
    [model] = ai.models.list().data
    assert model.id == "demo"
    assert ai.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        ai.chat.completions.create(model="gpt-5", messages=QUESTION)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 1000),
        ("max_completion_tokens", 0),
        ("stop", 5),
        ("n", 0),
        ("logit_bias", {"5": "x"}),
        ("store", True),
        ("audio", {"voice": "x"}),
        ("top_logprobs", 3),
        ("response_format", {"type": "xml"}),
        ("stream_options", {"include_usage": True}),
        ("chat_template_kwargs", {"cheat": True}),
        ("temprature", 1),
    ],
)
def test_what_is_not_supported_is_refused_by_name(ai: Any, field: str, value: object) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ai.chat.completions.create(model="demo", messages=QUESTION, extra_body={field: value})
    assert refused.value.param == field
    assert refused.value.type == "invalid_request_error"


def test_a_prompt_that_is_too_long_has_the_code_of_openai(ai: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ai.completions.create(model="demo", prompt=[5] * 5000, stream=True)
    assert refused.value.code == "context_length_exceeded"


def test_responses(ai: Any) -> None:
    answer = ai.responses.create(model="demo", input="What is 2 + 3?", temperature=0)
    assert answer.output_text == "5"
    assert (answer.status, answer.usage.input_tokens, answer.usage.output_tokens) == ("completed", 16, 2)
    items = [{"role": "user", "content": [{"type": "input_text", "text": "What is 2 + 3?"}]}]
    with ai.responses.stream(model="demo", input=items, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == "5"
    cut = ai.responses.create(model="demo", input="Please reverse the word coral.", max_output_tokens=1)
    assert cut.incomplete_details.reason == "max_output_tokens"
    for field, value in (("previous_response_id", "resp_1"), ("tools", [{"type": "web_search"}]), ("store", True)):
        with pytest.raises(openai.BadRequestError) as refused:
            ai.responses.create(model="demo", input="Hello", **{field: value})
        assert refused.value.param == field


def test_a_response_follows_a_schema(ai: Any) -> None:
    pytest.importorskip("llguidance", reason="needs the extra structured")
    form = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}
    answer = ai.responses.create(model="demo", input="What is 2 + 3?", text={"format": form}, max_output_tokens=64)
    assert set(json.loads(answer.output_text)) == {"sum"}


def test_embeddings(ai: Any) -> None:
    texts = ["What is 2 + 3?", "Name the capital of Chad."]
    found = ai.embeddings.create(model="demo", input=texts)
    floats = ai.embeddings.create(model="demo", input=texts[0], encoding_format="float")
    first = found.data[0].embedding
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-4)
    assert floats.data[0].embedding == pytest.approx(first, abs=1e-5)
    assert first != pytest.approx(found.data[1].embedding, abs=1e-2)
    with pytest.raises(openai.BadRequestError) as refused:
        ai.embeddings.create(model="demo", input=texts, dimensions=4)
    assert refused.value.param == "dimensions"
